"""The ways to run one site that are compared: by NCCL, symmetric memory, FlashInfer by hand and our operator."""

import functools

import torch
import torch.distributed as dist
from ranks import device, say
from site_point import EPS, GROUP_SIZE, tail
from torch.distributed import _functional_collectives as funcol


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


class Columns:
    """The sites: functions from a residual to ``(results, next residual)``, which find ``x`` written."""

    def __init__(self, options):
        self.options = options
        self.group = dist.group.WORLD.group_name
        self.gloo = dist.new_group(backend="gloo")
        self.workspace = self.symmetric = None

    def prepare(self):
        """Collective: memory for the largest size."""
        tokens, hidden = max(self.options.tokens), max(self.options.hidden)
        self.workspace, _ = self.attempt("FlashInfer's workspace", self.make_workspace, tokens, hidden)
        if not self.options.without_inductor:
            self.symmetric, _ = self.attempt("symmetric memory", self.make_symmetric, tokens * hidden)

    def attempt(self, what, function, *args):
        """``(what a function gives, None)``, or ``(None, why)`` on all ranks where it failed on any."""
        result = error = None
        try:
            result = function(*args)
        except Exception as caught:  # noqa: BLE001  a column that cannot run here leaves the others
            error = f"{type(caught).__name__}: {caught}"
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self.gloo)
        if any(errors):
            say(f"{what} failed:", next(e for e in errors if e).splitlines()[0][:300])
            return None, next(e for e in errors if e)
        return result, None

    def make_workspace(self, tokens, hidden):
        import flashinfer.comm as comm
        from flashinfer.comm.mnnvl import TorchDistBackend

        workspace = comm.create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=torch.bfloat16,
            comm_backend=TorchDistBackend(self.gloo),
            group=self.gloo,
        )
        if workspace.backend != "trtllm":
            raise RuntimeError(f"the workspace is {workspace.backend}, needs trtllm: no multicast")
        return workspace

    def make_symmetric(self, elements):
        import torch.distributed._symmetric_memory as symm_mem

        memory = symm_mem.empty(elements, dtype=torch.bfloat16, device=device())
        symm_mem.rendezvous(memory, self.group)
        return memory

    def of(self, point):
        """Name → site."""
        found = {}
        two_shot = point.tokens > dist.get_world_size()
        if not self.options.without_inductor:
            rest = compiled(tail(point.pattern)) if point.pattern.norms else lambda reduced, *_: ((reduced,), reduced)
            found["nccl_inductor"] = self.whole(point) if self.options.whole else self.nccl(point, rest)
            if self.symmetric is not None:
                found["symm_mem_one_shot"] = self.symm_mem(point, rest, False)
                if two_shot:
                    found["symm_mem_two_shot"] = self.symm_mem(point, rest, True)
        for pdl in (False, True) if self.options.pdl else (False,):
            suffix = "_pdl" if pdl else ""
            if self.workspace is not None:
                found[f"flashinfer_one_shot{suffix}"] = self.flashinfer(point, True, pdl)
                if two_shot:
                    found[f"flashinfer_two_shot{suffix}"] = self.flashinfer(point, False, pdl)
            found[f"fusion_core{suffix}"] = self.ours(point, pdl)
        return found

    def nccl(self, point, rest):
        def site(residual):
            torch.ops._c10d_functional.all_reduce_(point.x, "sum", self.group)
            torch.ops._c10d_functional.wait_tensor(point.x)
            return rest(point.x, residual, point.weight, point.scale)

        return site

    def whole(self, point):
        """The definition with its producer; Inductor copies the input, then reduces the copy in place."""
        rest = tail(point.pattern) if point.pattern.norms else lambda reduced, *_: ((reduced,), reduced)

        @compiled
        def run(source, residual, weight, scale):
            return rest(funcol.all_reduce(source * 1.0, "sum", self.group), residual, weight, scale)

        def site(residual):
            return run(point.source, residual, point.weight, point.scale)

        site.produces = True
        return site

    def symm_mem(self, point, rest, two_shot):
        buffer = self.symmetric[: point.tokens * point.hidden].view(point.tokens, point.hidden)

        def site(residual):
            torch.mul(point.x, 1.0, out=buffer)
            if two_shot:
                reduced = torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self.group)
            else:
                reduced = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self.group)
            return rest(reduced, residual, point.weight, point.scale)

        return site

    def flashinfer(self, point, one_shot, pdl):
        outputs, call = Outputs(point), self.by_hand(point, one_shot, pdl)
        written = {"norm_out": outputs.normed, "quant_out": outputs.quantized, "scale_out": outputs.scale}

        def site(residual):
            total = outputs.total(residual)
            if point.pattern.norms:
                call(residual_in=residual if outputs.zeros is None else outputs.zeros, residual_out=total, **written)
            else:
                call(output=total)
            return outputs.results(total), total

        return site

    def by_hand(self, point, one_shot, pdl):
        """FlashInfer's function with all that does not change from call to call."""
        import flashinfer.comm as comm

        pattern, given = point.pattern, {}
        if pattern.norms:
            given = {"rms_gamma": point.weight, "rms_eps": EPS}
            if pattern.code < 10:
                given["output"] = torch.empty_like(point.x)  # not written, and without it allocated in every call
        if pattern.quantization == "static_fp8":
            given["scale_factor"] = point.scale
        if pattern.quantization == "group_fp8":
            given["block_quant_group_size"] = GROUP_SIZE
        return functools.partial(
            comm.allreduce_fusion,
            input=point.x,
            workspace=self.workspace,
            pattern=pattern.code,
            launch_with_pdl=pdl,
            trigger_completion_at_end=True,
            use_oneshot=one_shot,
            fp32_acc=True,
            **given,
        )

    def ours(self, point, pdl):
        def site(residual):
            *results, total = self.operator(point, pdl)(residual)
            return tuple(results) or (total,), total

        return site

    def operator(self, point, pdl):
        """Our operator as a function of the residual that gives a sequence."""
        import fusion_flashinfer.ops  # noqa: F401  registers them

        pattern, group = point.pattern, self.group
        operator = getattr(torch.ops.fusion_flashinfer, pattern.name).default
        more = {"pdl": True} if pdl else {}
        more |= {"two_shot": True} if chosen(point) == "flashinfer_two_shot" else {}
        x, weight = point.x, point.weight
        if not pattern.norms:
            return lambda residual: (operator(x, group, **more),)
        behind = [point.scale] if pattern.quantization == "static_fp8" else []
        behind += [EPS, 0.0, *([GROUP_SIZE] if pattern.quantization == "group_fp8" else []), group]
        if pattern.adds:
            return lambda residual: operator(x, residual, weight, *behind, **more)
        return lambda residual: operator(x, weight, *behind, **more)


class Outputs:
    """What a call by hand writes; ``residual_out`` goes back and forth between two buffers."""

    def __init__(self, point):
        pattern, x = point.pattern, point.x
        tokens, hidden = x.shape
        self.pattern = pattern
        self.turns = (torch.empty_like(x), torch.empty_like(x))
        self.zeros = torch.zeros_like(x) if pattern.norms and not pattern.adds else None
        self.normed = self.quantized = self.scale = None
        if pattern.norms and (pattern.norm_out or not pattern.quantization):
            self.normed = torch.empty_like(x)
        if pattern.quantization:
            self.quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        if pattern.quantization == "token_fp8":
            self.scale = torch.empty(tokens, 1, device=x.device)
        if pattern.quantization == "group_fp8":
            rows, columns = (tokens + 3) // 4 * 4, (hidden // GROUP_SIZE + 3) // 4
            self.scale = torch.empty_strided((tokens, columns), (1, rows), dtype=torch.int32, device=x.device)

    def total(self, residual):
        return self.turns[residual is self.turns[0]]

    def results(self, total):
        found = tuple(each for each in (self.quantized, self.scale, self.normed) if each is not None)
        return found or (total,)


def chosen(point):
    """The column of the form that our operator is asked for at this size: by FlashInfer's limits, without a table."""
    from fusion_flashinfer.limits import LIMITS

    major, minor = torch.cuda.get_device_capability()
    limit = LIMITS.get((f"sm_{major}{minor}", dist.get_world_size()))
    two_shot = limit is not None and point.x.numel() * point.x.element_size() > limit.one_shot
    return "flashinfer_two_shot" if two_shot and point.tokens > dist.get_world_size() else "flashinfer_one_shot"
