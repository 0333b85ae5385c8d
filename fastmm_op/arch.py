"""What the planner knows about a card: the vendor's limits, and rates that were measured."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Card:
    """What a driver says of one card.

    Attributes:
        capability: CUDA's compute capability, (major, minor).
        sms: multiprocessors.
        memory_peak: bytes a second of the memory's pins; None if the driver does not say.
    """

    capability: tuple[int, int]
    sms: int
    memory_peak: float | None = None


@dataclass(frozen=True)
class Arch:
    """One GPU architecture as the planner sees it.

    Rates are what good kernels reach on ordinary data, not datasheet peaks. They rank plans; they
    promise nothing.

    Attributes:
        name: ``"sm_80"``, ``"sm_89"`` or ``"sm_90"``: the code that is generated.
        sms: multiprocessors of the card.
        shared_memory: bytes of shared memory a block may use.
        shared_memory_per_sm: bytes that the blocks of one SM share.
        threads_per_sm: threads that one SM holds.
        wgmma: the tensor core reads both operands from shared memory (Hopper).
        tma: the bulk tensor copy engine is there (Hopper).
        tma_rounds: it can round fp32 to TF32 as it copies; Triton has to know how.
        memory_peak: bytes a second of the memory's pins, by its clock and width, of the card that
            the rates are of.
        bandwidth: bytes a second of a large device-to-device copy, read plus written.
        fp16_flops: FLOP a second of fp16 or bf16 products, fp32 accumulators.
        tf32_flops: FLOP a second of TF32 products read directly from fp32 operands.
        fp32_flops: FLOP a second of ordinary fp32 units.
        l2_bytes: of the L2 cache.
        splits_fp32: three products of TF32 are faster than one of the ordinary fp32 units, so
            ``"fp32"`` splits operands in registers. Measured on sm_90; on the others by the rates.
        ieee_k_major: share of ``fp32_flops`` where B is K-major, so that neighbouring threads read
            the same bank of shared memory. 32x4096x11008 NT took 239 us where 95 were estimated
            without it (study_2026-11-25_tf32_tiles.txt); on sm_80 and sm_89 nobody has looked.
        launch_seconds: what one more kernel in a row costs on the device.
        dependent_seconds: the same of one that may start before the one ahead of it has ended;
            None where there is no such launch (before Hopper). On an H100 1.3 to 2.1 us less than
            launch_seconds (NVIDIA_H100_80GB_HBM3/chained_2026-11-27.txt).
    """

    name: str
    sms: int
    shared_memory: int
    shared_memory_per_sm: int
    threads_per_sm: int
    wgmma: bool
    tma: bool
    tma_rounds: bool
    memory_peak: float
    bandwidth: float
    fp16_flops: float
    tf32_flops: float
    fp32_flops: float
    l2_bytes: float
    splits_fp32: bool
    ieee_k_major: float
    launch_seconds: float
    dependent_seconds: float | None

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start before the one ahead of it has ended."""
        return self.dependent_seconds is not None

    @property
    def next_seconds(self) -> float:
        """What each kernel of a call but the first costs on the device."""
        return self.launch_seconds if self.dependent_seconds is None else self.dependent_seconds


# sm_90 rates are fitted to the H200's runs in benchmarks/results/NVIDIA_H200, where nothing else is
# said. Those of sm_80 and sm_89 are published figures of the A100 and the RTX 4090: predictions,
# this project has measured neither card.
ARCHES = {
    "sm_80": Arch(
        name="sm_80",
        sms=108,
        shared_memory=166912,
        shared_memory_per_sm=167936,
        threads_per_sm=2048,
        wgmma=False,
        tma=False,
        tma_rounds=False,
        memory_peak=1.555e12,
        bandwidth=1.5e12,
        fp16_flops=240e12,
        tf32_flops=90e12,
        fp32_flops=18e12,
        l2_bytes=40e6,
        splits_fp32=True,
        ieee_k_major=1.0,
        launch_seconds=3e-6,
        dependent_seconds=None,
    ),
    "sm_89": Arch(
        name="sm_89",
        sms=128,
        shared_memory=101376,
        shared_memory_per_sm=102400,
        threads_per_sm=1536,
        wgmma=False,
        tma=False,
        tma_rounds=False,
        memory_peak=1.008e12,
        bandwidth=0.92e12,
        fp16_flops=150e12,
        tf32_flops=70e12,
        fp32_flops=45e12,
        l2_bytes=72e6,
        splits_fp32=False,
        ieee_k_major=1.0,
        launch_seconds=3e-6,
        dependent_seconds=None,
    ),
    "sm_90": Arch(
        name="sm_90",
        sms=132,
        shared_memory=232448,
        shared_memory_per_sm=233472,
        threads_per_sm=2048,
        wgmma=True,
        tma=True,
        tma_rounds=True,
        memory_peak=4.917e12,
        bandwidth=4.2e12,
        fp16_flops=700e12,
        tf32_flops=150e12,
        fp32_flops=40e12,
        l2_bytes=50e6,
        splits_fp32=True,
        ieee_k_major=0.35,
        launch_seconds=4e-6,
        dependent_seconds=2.3e-6,
    ),
}


def arch_for(card: Card) -> Arch | None:
    """The architecture entry for a card, or None where nothing here runs.

    Of the measured card's rates another has a share: of the arithmetic by its SMs, of the bandwidth
    by its memory's peak. Cards newer than Hopper get sm_89's plans: plain Triton, within 99 KB of
    shared memory.
    """
    if card.capability < (8, 0):
        return None
    arch = ARCHES[{(8, 0): "sm_80", (9, 0): "sm_90"}.get(card.capability, "sm_89")]
    bandwidth = arch.bandwidth * (card.memory_peak or arch.memory_peak) / arch.memory_peak
    return resized(arch, card.sms, bandwidth)


def resized(arch: Arch, sms: int | None = None, bandwidth: float | None = None) -> Arch:
    """An architecture with another number of SMs, and arithmetic in proportion; and bandwidth.

    Args:
        bandwidth: bytes a second, kept to a whole GB a second: what a command line can repeat.
    """
    share = (sms or arch.sms) / arch.sms
    return replace(
        arch,
        sms=sms or arch.sms,
        bandwidth=round((bandwidth or arch.bandwidth) / 1e9) * 1e9,
        fp16_flops=arch.fp16_flops * share,
        tf32_flops=arch.tf32_flops * share,
        fp32_flops=arch.fp32_flops * share,
    )


def card_text(arch: Arch) -> str:
    """A card in words, as far as plans depend on it."""
    return f"{arch.name} with {arch.sms} SMs, copying {arch.bandwidth / 1e9:.0f} GB/s"


def occupancy(
    registers: int,
    num_warps: int,
    shared_memory: int,
    shared_memory_per_sm: int,
    threads_per_sm: int,
) -> int:
    """Blocks that fit an SM at once, by registers a thread, shared memory (bytes) and threads."""
    # The hardware hands out registers by 256 a warp, and keeps 1 KiB of shared memory a block.
    registers_a_warp = -(-registers * 32 // 256) * 256
    return min(
        65536 // (registers_a_warp * num_warps),
        shared_memory_per_sm // (shared_memory + 1024),
        threads_per_sm // (32 * num_warps),
    )
