"""The device as the run would use it: whether it works, what fits, how fast it is.

These checks import torch and may crash: app.tools.doctor.child runs them in a process of their own.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Measurement, Timer

from app.containers import in_container
from app.distributed.launch import processes_to_launch
from app.formats import format_bytes, plural
from app.hardware.device import select_device
from app.hardware.gpus import find_gpu
from app.hardware.memory import available_bytes
from app.model.architectures import build_config, build_model
from app.model.language_model import LanguageModel
from app.settings.settings import Settings
from app.tools.doctor.checks import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    DeviceReport,
    Finding,
    Status,
    graded,
)
from app.train.compile import compile_cache_summary, compile_problem, compiled_loss
from app.train.micro_batch import estimate_memory, fit_to_memory
from app.train.optimizer import build_optimizers

# Main memory of a process that trains on a GPU: libraries, pinned batches, shards' pages.
_HOST_BYTES = 4_000_000_000
_SHARED_MEMORY_BYTES = 256 << 20
# Large products usually reach 0.6 to 0.9 of a data sheet's rate, copies 0.8 to 0.9; far below that,
# heat, the power supply or another program slows the device.
_MIN_SHARE_OF_PEAK, _MIN_SHARE_OF_MEMORY_RATE = 0.4, 0.6
_MATRIX_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 1024}
_COPIED_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 28}
_MEASURED_SECONDS = 0.5
# More tokens at once would only take longer on a CPU.
_CPU_TOKENS = 1024
# Nats per token: compiled and plain code round differently, in bf16 visibly.
_LOSS_TOLERANCE = 0.05


class DeviceChecks:
    """Checks for the device that `train` would select; UserError if there is none.

    Attributes:
        report: the measurements so far
    """

    def __init__(self, settings: Settings, *, can_cache: bool) -> None:
        cfg = settings.train
        # Uncompiled code takes more memory: the choice of the micro-batch must know.
        self._cfg = cfg if can_cache else cfg.model_copy(update={"compile": False})
        self._recompute = cfg.recompute
        self._not_compiled = "not needed: TRAIN_COMPILE=false"
        if cfg.compile and not can_cache:
            self._not_compiled = "not tried: DATA_DIR's cache cannot be written"
        self._config = build_config(settings.model.shape())
        processes = processes_to_launch(cfg.processes, cfg.device)
        self._device = select_device(cfg.device, cfg.precision, cfg.deterministic)
        self._here = self._device.torch_device
        # NVIDIA's; Apple's works in main memory.
        self._on_gpu = self._here.type == "cuda"
        gpus = range(torch.cuda.device_count() if self._on_gpu else 0)
        self._all_devices = [torch.device("cuda", index) for index in gpus] or [self._here]
        with torch.device("meta"):
            model = self._new_model()
        self._num_parameters = model.num_parameters()
        self._micro_batch_size = 1
        self.report = DeviceReport(self._here.type, processes)
        self.report.model_flops_per_token = model.flops_per_token()

    def _new_model(self) -> LanguageModel:
        model = build_model(self._config, bf16_residual=self._cfg.residual == "bf16")
        model.recompute = self._cfg.recompute == "true"
        return model

    def check_device(self) -> Iterator[Finding]:
        """Check which device trains, with which torch."""
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        found = f"{self._device.name}; torch {torch.__version__}, built for {build}"
        lacks_gpu = self._here.type == "cpu" and self._cfg.device == "auto"
        if lacks_gpu:
            found = f"no GPU: trains on the CPU. {found}"
        elif self._on_gpu:
            major, minor = torch.cuda.get_device_capability()
            found = (
                f"{len(self._all_devices)} x {found}; compute capability {major}.{minor}; "
                f"training in {plural(self.report.processes, 'process', 'processes')}"
            )
        place = " on the host" if in_container() else ""
        fix = f"look at `nvidia-smi`{place}, or set TRAIN_DEVICE=cpu if that is what you want"
        yield graded("device", found, ("warn", lacks_gpu, fix))

    def check_precision(self) -> Iterator[Finding]:
        """Check that matrix products are in 16 bits where that is faster."""
        if self._device.precision == "bf16":
            yield Finding("precision", "pass", "bf16")
        elif self._device.precision == "fp16":
            yield Finding("precision", "pass", "fp16, with loss scaling")
        elif self._device.precision == "fp8":
            yield Finding("precision", "pass", "bf16, the output layer in 8-bit floats")
        elif self._cfg.precision == "float32":
            yield Finding("precision", "pass", "float32, as TRAIN_PRECISION says")
        elif not self._on_gpu:
            kind = "CPU" if self._here.type == "cpu" else "GPU"
            yield Finding("precision", "pass", f"float32: this {kind} is no faster in bf16")
        else:
            found = "float32: this GPU has no units for 16 bits, several times as fast on others"
            yield Finding("precision", "warn", found, "use a GPU of the Turing generation or newer")

    def check_memory(self) -> Iterator[Finding]:
        """Check that a micro-batch fits into the device, and a save's copies into main memory."""
        device, processes = self._device, self.report.processes
        self._cfg, size = fit_to_memory(self._cfg, self._config, None, device, processes, processes)
        self._micro_batch_size = size
        estimate = estimate_memory(self._cfg, self._config, device, processes)
        needed, free = estimate.bytes_for(size), available_bytes(self._here, processes)
        # The estimate is an upper bound.
        status: Status = "warn" if needed < 2 * free else "fail"
        is_too_large = estimate.fixed_bytes > free
        yield graded(
            "memory",
            f"{format_bytes(free)} free; a micro-batch of {plural(size, 'sequence')} needs "
            f"{format_bytes(needed)} at most"
            + (", with activations computed again" if self._cfg.recompute == "true" else ""),
            ("fail", is_too_large, "use a smaller model, or a device with more memory"),
            (status, needed > free, "set TRAIN_MICRO_BATCH_SIZE=auto, or use a smaller model"),
        )
        if self._on_gpu:
            # Rank 0 copies weights and moments while a checkpoint is written, to pinned memory, of
            # which torch takes powers of two.
            copy = 2 * CHECKPOINT_BYTES_PER_PARAMETER * self._num_parameters
            needed, free = processes * _HOST_BYTES + copy, available_bytes(torch.device("cpu"))
            found = f"{format_bytes(free)} of main memory free; about {format_bytes(needed)} needed"
            fix = "use a machine with more memory"
            yield graded("host memory", found, ("warn", free < needed, fix))

    def check_shared_memory(self) -> Iterator[Finding]:
        """Check /dev/shm, through which NCCL connects the GPUs of a machine."""
        if self.report.processes == 1 or not self._on_gpu:
            yield Finding("shared memory", "skip", "not needed: only several GPUs use it")
            return
        shm, needed = os.statvfs("/dev/shm"), self.report.processes * _SHARED_MEMORY_BYTES
        free = shm.f_bavail * shm.f_frsize
        found = f"{format_bytes(free)} free in /dev/shm; NCCL may take {format_bytes(needed)}"
        fix = "raise shm_size in compose.yaml"
        yield graded("shared memory", found, ("warn", free < needed, fix))

    def check_attention(self) -> Iterator[Finding]:
        """Check that the attention kernel that torch selects works, and is a fast one."""
        if self._here.type == "mps":
            yield Finding("attention", "skip", "torch has one kernel only for Apple's GPU")
            return
        config, dtype = self._config, self._device.dtype
        shape = 1, config.num_heads, config.context_length, config.head_dim
        q = torch.zeros(shape, dtype=dtype, device=self._here, requires_grad=True)
        kernel = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
        scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        is_slow = kernel == SDPBackend.MATH
        found = "no fast kernel works here" if is_slow else kernel.name.lower().replace("_", " ")
        fix = "compare torch's build with the GPU: is it made for its compute capability?"
        yield graded("attention", found, ("warn", is_slow, fix))

    def check_matmul(self) -> Iterator[Finding]:
        """Measure large matrix products in the precision of the blocks, on every GPU."""
        precision = "bf16" if self._device.precision == "fp8" else self._device.precision
        side = _MATRIX_SIDE[self._here.type]
        for device in self._all_devices:
            a = torch.randn(side, side, device=device, dtype=self._device.dtype)
            rate = 2 * side**3 / min(_measure(partial(torch.matmul, a, a), device).times)
            if device == self._here:
                self.report.matmul_flops = rate
            found = f"{_prefix(device)}{rate / 1e12:.3g} TFLOP/s in {precision}"
            yield _compared("matmul", found, rate, self._device.peak_flops, _MIN_SHARE_OF_PEAK)

    def check_copies(self) -> Iterator[Finding]:
        """Measure how fast every GPU copies within its memory, and from main memory."""
        gpu = find_gpu(self._device.name)
        peak = gpu.memory_rate if gpu else None
        for device in self._all_devices:
            data = torch.zeros(_COPIED_BYTES[device.type] // 4, device=device)
            target = torch.zeros_like(data)
            # Each byte is read and written.
            rate = 2 * data.nbytes / min(_measure(partial(target.copy_, data), device).times)
            found = f"{_prefix(device)}{format_bytes(rate)}/s within memory"
            if self._on_gpu:
                pinned = torch.zeros(data.numel() // 4, pin_memory=True)
                copy = partial(data[: pinned.numel()].copy_, pinned)
                host_rate = pinned.nbytes / min(_measure(copy, device).times)
                found += f", {format_bytes(host_rate)}/s from the machine's"
            yield _compared("copies", found, rate, peak, _MIN_SHARE_OF_MEMORY_RATE)

    def check_compile(self) -> Iterator[Finding]:
        """Check that the compiled model runs here, with the plain model's loss; measure training.

        Where compiling fails, the plain model is measured.
        """
        if self._on_gpu:
            torch.cuda.empty_cache()
        problem = compile_problem(self._device) if self._cfg.compile else None
        if not self._cfg.compile:
            yield Finding("compile", "skip", self._not_compiled)
        elif problem:
            # Uncompiled code takes more memory.
            changes = {"compile": False, "recompute": self._recompute}
            self._cfg = self._cfg.model_copy(update=changes)
            yield from self.check_memory()
            found = f"{problem.problem}: training would be slower"
            yield Finding("compile", "fail", found, f"{problem.fix}, or set TRAIN_COMPILE=false")
        compiled = self._cfg.compile
        plain, loss = self._train(compiled=compiled)
        if compiled:
            fix = "set TRAIN_COMPILE=false; if the losses differ then as well, change the machine"
            # NaN is within no tolerance.
            differs = not abs(loss - plain) < _LOSS_TOLERANCE
            found = f"{compile_cache_summary()}, in {self.report.compile_seconds:.0f} s; "
            found += f"loss {loss:.4f}, {plain:.4f} without compiling"
            yield graded("compile", found, ("fail", differs, fix))

    def _train(self, *, compiled: bool) -> tuple[float, float]:
        """Measure training, and return the losses of a batch, plain and as train computes it."""
        length, batch_size = self._config.context_length, self._micro_batch_size
        if self._here.type == "cpu":
            batch_size = min(batch_size, max(1, _CPU_TOKENS // length))
        torch.manual_seed(0)
        with self._here:
            model = self._new_model()
            tokens = torch.randint(self._config.vocab_size, (batch_size, length + 1))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.no_grad(), self._device.forward_pass():
            # One by one: uncompiled, logits take more memory than train counts on.
            losses = [model(x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]
            plain = torch.stack(losses).mean().item()
        optimizers = build_optimizers(model, self._cfg, self._device.dtype)
        loss_function = compiled_loss(model, self._device) if compiled else model

        def forward_backward() -> float:
            with self._device.forward_pass():
                loss = loss_function(inputs, targets)
            loss.backward()
            return float(loss.item())

        def update() -> None:
            # Optimizers.step would drop the gradients, and leave nothing to repeat.
            for optimizer in optimizers.parts:
                optimizer.step()

        started = time.perf_counter()
        loss = forward_backward()
        if compiled:
            self.report.compile_seconds = time.perf_counter() - started
        # Once without measuring: it allocates the moments.
        update()
        self.report.micro_batch_seconds = _measure(forward_backward, self._here).median
        self.report.optimizer_seconds = _measure(update, self._here).median
        self.report.micro_batch_tokens = inputs.numel()
        return plain, loss


def _compared(check: str, found: str, rate: float, peak: float | None, share: float) -> Finding:
    """Compare a measured rate with the data sheet; it should reach at least `share` of it."""
    if peak is None:
        return Finding(
            check, "pass", f"{found}; not compared: no data sheet of this device is known"
        )
    is_slow = rate < share * peak
    found += f", {rate / peak:.0%} of its data sheet's rate"
    found += f"; {share:.0%} and more are usual" if is_slow else ""
    fix = "look at `nvidia-smi -q -d PERFORMANCE`; if it stays so slow, take another machine"
    return graded(check, found, ("warn", is_slow, fix))


def _prefix(device: torch.device) -> str:
    return f"GPU {device.index}: " if device.type == "cuda" else ""


def _measure(work: Callable[[], object], device: torch.device) -> Measurement:
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    with torch.accelerator.device_index(device.index):
        return timer.blocked_autorange(min_run_time=_MEASURED_SECONDS)
