"""Requirements that are wrong: they accept, refuse or say what they must not."""

from dataclasses import dataclass

from fusion_core import (
    DType,
    Reason,
    Site,
)


class AnyDType(DType):
    """A guard that was forgotten."""

    def unmet(self, site: Site) -> Reason | None:
        return None


class Never(DType):
    """A guard that lets nothing through."""

    def unmet(self, site: Site) -> Reason | None:
        return Reason("never", "something was found", "nothing that there is", self.arg)


class Silent(DType):
    """A guard that refuses without a word."""

    def unmet(self, site: Site) -> Reason | None:
        return None if super().unmet(site) is None else Reason("", "")


@dataclass(frozen=True)
class Strange:
    """A requirement of a class that the kit does not know."""

    def unmet(self, site: Site) -> Reason | None:
        return None
