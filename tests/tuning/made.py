"""Tables for tests: two that were measured, and small ones made of points."""

from pathlib import Path

from fusion_core.tables import UNFUSED, Machine, Row, Table
from fusion_core.tables.store import read

FOLDER = Path(__file__).parent
ADD = "all_reduce_add_rms_norm"
ONE_SHOT, TWO_SHOT = f"flashinfer.{ADD}", f"flashinfer.{ADD}_two_shot"
BARE, SYMM = "flashinfer.all_reduce", "reference.symm_mem_two_shot"
MADE = "2026-11-22T10:00:00+00:00"
RECORDED = {ranks: read(FOLDER / f"h200x{ranks}.json") for ranks in (2, 4)}


def table(*rows: Row) -> Table:
    return Table(Machine("Acme 9000", world_size=2), rows, MADE, "a test")


def point(hidden: int, tokens: int, unfused: float, dtype: str = "bfloat16", **us: float) -> Row:
    return Row("all_reduce", dtype, hidden, tokens, {UNFUSED: unfused, **{f"acme.{name}": us[name] for name in us}})
