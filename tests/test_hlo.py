"""The reader of compiled programs, on programs small enough to count by hand."""

from pathlib import Path

import pytest

from benchmarks.aot.hlo import Program
from benchmarks.gpu import machine_code
from benchmarks.gpu.cards import CARDS

HLO = (Path(__file__).parent / "data" / "step.hlo").read_text()
"""Three steps with two segments (4, 8, 2, 128) and a vector of 1024 numbers. A step copies a segment in the
worse branch of a conditional, puts a row by two scatters, gathers 256 numbers to 1024, reads two rows."""
VECTOR = 4 * 1024
SEGMENT = 8 * VECTOR

THUNKS = """\
001: kCopy  [source       | next=002 (1)] kCopy
002: kWhile [prev=001 (1) | sink        ]
condition:
    003: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        004: kCopy         [source | next=056 (1)] kCopy
        056: kConditional  [prev=004 (1) | sink]
          branch_0:
            No thunks.          branch_1:
            057: kCustomKernel [source | sink] input_reduce_fusion_13 grid: [123, 1, 1]
    058: kConditional [source | sink]
      false_branch:
        059: kAllReduce [source | sink]
      true_branch:
        060: kCopy [source | sink] kCopy
"""


def test_bytes_kernels_and_copies_of_a_step():
    program = Program(HLO)
    step = program.step()
    # One row written and read, the other scatter not at all, each with its index; the copy's segment read and
    # written; the gather's 256 and 1024 numbers; two rows read and one written; one vector negated.
    recurrence = 2 * VECTOR + 4 + 2 * SEGMENT + 3 * VECTOR
    gathered = VECTOR + VECTOR / 4
    assert step.hbm == recurrence + gathered + 2 * VECTOR
    assert program.recurrence() == recurrence
    assert step.kernels == 6
    assert program.traffic().hbm == 3 * step.hbm  # by the bound in the condition
    assert (step.count["all-gather"], step.bytes["all-gather"]) == (1, VECTOR)
    assert program.copies({(4, 8, 2, 128)}) == 1
    assert program.copies({(4, 2, 128)}) == 0
    assert program.conditionals() == 1


def test_products_of_a_library_say_their_precision():
    """As XLA writes them: what is asked for lies in the call's configuration."""
    call = (
        'custom-call(f32[2,3]{1,0} %a, f32[3,2]{1,0} %b), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}'
    )
    lines = [
        "HloModule jit_f, is_scheduled=true",
        "ENTRY %main (a: f32[2,3], b: f32[3,2]) -> f32[2,2] {",
        "  %a = f32[2,3]{1,0} parameter(0)",
        "  %b = f32[3,2]{1,0} parameter(1)",
        f"  ROOT %c = f32[2,2]{{1,0}} {call}",
        "}",
    ]
    assert Program("\n".join(lines)).precisions() == {"cuBLAS, highest": 1}


def test_what_the_host_runs_is_what_lies_outside_of_command_buffers():
    expected = {"kCopy": 2, "kWhile": 1, "kCustomKernel": 1, "kCommandBuffer": 1, "kConditional": 1}
    assert machine_code.on_host(THUNKS) == expected | {"kAllReduce": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tf32"),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "bf16"),
        ("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32", "tf32"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "f64"),
    ],
)
def test_types_of_tensor_cores(name, kind):
    assert machine_code.instructions(f"\t{name} {{%f1, %f2}};\n\tfma.rn.f32 %f1, %f2, %f3;\n") == {kind: 1}


def test_arithmetic_in_float64_is_found():
    ptx = "\tadd.rn.f64 %fd1, %fd2, %fd3;\n\tcvt.f64.f32 %fd4, %f1;\n\tld.global.f64 %fd5, [%rd1];\n"
    assert machine_code.instructions(ptx) == {"f64": 2}


def test_cards_have_their_memory_and_bandwidth():
    """The figures of the data sheets, in their units."""
    h100, rtx = CARDS["h100"], CARDS["rtx4090"]
    assert (round(h100.memory / 1e9), round(h100.bandwidth / 1e12, 2)) == (85, 3.35)
    assert (rtx.memory / 2**30, rtx.bandwidth / 1e9) == (24, 1008)
    assert 'driver_version: "13.0.0"' in h100.config  # without it XLA gives no command buffer
