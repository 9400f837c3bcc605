"""The fused kernels compiled for GPUs that are not here: by Triton to PTX, by its own assembler to machine code."""

import re
import subprocess
from pathlib import Path

import pytest

from common import token_kernel

triton = pytest.importorskip("triton", reason="triton comes with torch for CUDA, and with vLLM")
# The newest that Triton brings; for some architectures it writes PTX that the other does not know.
ASSEMBLER = max((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
# (type of the head, divisor of V, teacher, what is masked, λ₁ on the device, entropy): what real vocabularies take.
FORMS = {
    "iclr2026": ("bf16", 16, True, False, False, token_kernel.TOP_K),
    "arxiv2024, masked, adaptive": ("bf16", 16, True, True, True, token_kernel.ALL),
    "iclr2026, fp32, GPT-2's odd vocabulary": ("fp32", 1, True, False, False, token_kernel.TOP_K),
    "task alone, fp16": ("fp16", 16, False, False, False, token_kernel.NONE),
}


def compiled(kernel, capability, dtype, divisor, has_teacher, is_masked, is_adaptive, entropy):
    """A kernel's PTX, as a launch of `token_terms` has it compiled; V is an argument, of which the divisor is known."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    logits = f"*{dtype}"
    types = {"z_ptr": logits, "teacher_ptr": logits, "stats_ptr": "*fp32", "targets_ptr": "*i64", "maxima_ptr": logits}
    types |= {"V": "i32", "T": "fp32", "consistency": "*fp32" if is_adaptive else "fp32", "diversity": "fp32"}
    constants = {"HAS_TEACHER": has_teacher, "MASKED": is_masked, "ADAPTIVE": is_adaptive, "ENTROPY": entropy}
    constants |= {"WIDTH": token_kernel.WIDTH, "GROUP": token_kernel.GROUP}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = [name for name in kernel.arg_names if signature[name].startswith("*") or (name == "V" and divisor == 16)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items() if name in places},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_every_kernel_fits_into_registers(capability, tmp_path):
    """No register spills to memory, for any vocabulary: its size is an argument, and a row is taken in blocks."""
    for name, form in FORMS.items():
        for which in ("_read", "_write"):
            ptx = compiled(getattr(token_kernel, which), capability, *form)
            (tmp_path / "kernel.ptx").write_text(ptx)
            target = re.search(r"\.target (\w+)", ptx)[1]
            assert target.startswith(f"sm_{capability}")
            words = [ASSEMBLER, "-v", f"--gpu-name={target}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
            finished = subprocess.run(words, capture_output=True, text=True)
            assert finished.returncode == 0, finished.stderr
            spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", finished.stderr)
            assert spills == ["0", "0"], (name, which)
