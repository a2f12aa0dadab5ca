"""What computes: processor, accelerators, precisions, the kernels of a sparse layer, compilers."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from symphony_vlm.doctor.finding import Check, Outcome

__all__ = ["compilation", "device_checks"]


def device_checks(*, compile_: bool) -> list[Check]:
    """Checks of this machine's devices.

    Args:
        compile_: whether to try what is compiled here too, which takes up to a minute.
    """
    checks = [
        Check(name="accelerators", group="Devices", run=accelerators),
        Check(name="16 bits", group="Devices", run=sixteen_bits),
        Check(name="sparse layer", group="Devices", run=sparse_layer, required=True),
        Check(name="C++ compiler", group="Devices", run=cpp_compiler),
    ]
    if compile_:
        checks.append(Check(name="torch.compile", group="Devices", run=compilation))
        checks.append(Check(name="fused experts", group="Devices", run=fused_experts))
    return checks


def accelerators() -> Outcome:
    """The CUDA or MPS devices that PyTorch sees, or why it sees none."""
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            size = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {size}, capability {major}.{minor}")
        return Outcome(status="ok", detail="; ".join(found))
    if torch.backends.mps.is_available():
        return Outcome(status="ok", detail="mps; it is used where it is asked for (--device mps), else the CPU")
    if shutil.which("nvidia-smi") is None:
        return Outcome(status="absent", detail="none; models run on the CPU")
    if torch.version.cuda is None:
        return Outcome(
            status="warning",
            detail="an NVIDIA driver is here, and this PyTorch is built for the CPU alone",
            remedy="Install a CUDA build of torch and torchvision: https://pytorch.org/get-started/locally",
        )
    return Outcome(
        status="warning",
        detail=f"an NVIDIA driver is here, and PyTorch for CUDA {torch.version.cuda} finds no device",
        remedy="Compare with `nvidia-smi`: the driver may be too old, or CUDA_VISIBLE_DEVICES may hide the card.",
    )


def sixteen_bits() -> Outcome:
    """A product in bfloat16 where a model would run."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.full((16, 16), 0.5, device=device, dtype=torch.bfloat16)
    if not bool(((x @ x) == 4).all()):
        raise RuntimeError(f"a product in bfloat16 on {device.type} is wrong")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Outcome(
            status="warning",
            detail="this card emulates bfloat16",
            remedy="Train with bf16: false, and open models with --dtype float16.",
        )
    return Outcome(status="ok", detail=f"bfloat16 on {device.type}")


def sparse_layer() -> Outcome:
    """A small mixture of experts, forward and backward: a product for each token on the CPU, and grouped ones."""
    import torch

    from symphony_vlm.moe.configuration import MoEConfig
    from symphony_vlm.moe.layer import SparseMoE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layer = SparseMoE(MoEConfig(), layer_index=0, hidden_size=16, intermediate_size=32, hidden_act="silu")
    layer.reset(std=0.2)
    x_BSD = torch.randn(1, 12, 16)
    layer.experts.implementation = "batched_mm"
    plain_BSD = layer(x_BSD)
    plain_BSD.sum().backward()
    layer = layer.to(device)
    layer.experts.implementation = "segments"
    try:
        grouped_BSD = layer(x_BSD.to(device)).cpu()
        grouped_BSD.sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return Outcome(
            status="warning",
            detail=f"grouped products do not work on {device.type}: {str(error).splitlines()[0][:120]}",
            remedy="Install a torch built for it.",
        )
    difference = float((grouped_BSD - plain_BSD).detach().abs().max())
    # On CUDA the grouped kernel may compute in 16 bits inside; a wrong expert would differ by as much as the outputs.
    if difference > 0.05 * float(plain_BSD.detach().abs().max()):
        raise RuntimeError(f"grouped products differ from those of each token by {difference:.1e}")
    agreement = f"agree to {difference:.0e}" if difference else "are equal"
    return Outcome(status="ok", detail=f"products of each token and grouped ones on {device.type} {agreement}")


def cpp_compiler() -> Outcome:
    """What torch.compile on a CPU, DeepSpeed's extensions and our own are built with."""
    name = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    need = "torch.compile on a CPU, the deepspeed engines and fused experts"
    if name is None:
        return Outcome(status="absent", detail=f"for {need}", remedy="Debian, Ubuntu: apt install g++ python3-dev")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return Outcome(
            status="warning",
            detail=f"{name}, and Python's headers are missing; they are for {need}",
            remedy="Debian, Ubuntu: apt install python3-dev",
        )
    return Outcome(status="ok", detail=name)


def compilation() -> Outcome:
    """torch.compile of one addition, where a model would run."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return Outcome(
            status="broken",
            detail=first,
            remedy="Install a C++ compiler (CPU) or Triton (GPU), or leave compile: false.",
        )
    if not bool((result == 1).all()):
        return Outcome(status="broken", detail="a compiled addition is wrong", remedy="Leave compile: false.")
    return Outcome(status="ok", detail=f"works on {device.type}")


def fused_experts() -> Outcome:
    """``experts_implementation: fused`` on the CPU, against a product for each token."""
    import torch

    from symphony_vlm.moe.experts import Experts
    from symphony_vlm.moe.fused import load

    try:
        load()
    except OSError as error:
        return Outcome(
            status="absent",
            detail=f"experts_implementation: fused computes segments: {str(error)[:200]}",
            remedy="Install a C++ compiler, or use the default, auto.",
        )
    torch.manual_seed(0)
    experts = Experts(4, 16, 32, "silu", implementation="fused")
    experts.reset(std=0.2)
    arguments = (torch.randn(12, 16), torch.full((12, 2), 0.5), torch.rand(12, 4).topk(2).indices)
    fused_TD = experts(*arguments)
    experts.implementation = "batched_mm"
    difference = float((fused_TD - experts(*arguments)).detach().abs().max())
    # Sums of 32 fp32 products of at most 1.
    if difference > 1e-5:
        raise RuntimeError(f"fused experts differ from a product for each token by {difference:.1e}")
    return Outcome(status="ok", detail=f"a product for each token and fused ones agree to {difference:.0e}")
