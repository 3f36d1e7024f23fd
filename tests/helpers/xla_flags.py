"""How XLA compiles in the tests: most of their time goes into compiling many small programs."""

from importlib.metadata import version


def xla_flags(device_count: int) -> str:
    """Return XLA_FLAGS for so many virtual CPU devices, with which compiling is quick and what comes out is slow."""
    flags = [
        f"--xla_force_host_platform_device_count={device_count}",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # there is no other way to compile from then on
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
