"""Compile every Triton kernel for the GPU generation `sys.argv[1]` (90: Hopper): needs no GPU. Run as a program.

Writes a JSON list: each kernel's name, bytes of shared memory, and whether it uses the tensor cores.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dictlearn.kernels.triton import propose, rows, sparse, threshold

FLOAT, HALF, INDEX = "*fp32", "*bf16", "*i64"
ALIGNED = ("d", "n_latents", "n_groups", "width")  # sizes that are multiples of 16, as Triton notices at a call


def compile_for(generation: int, fn: object, types: list[str], **constants: object) -> dict[str, object]:
    names = fn.arg_names  # type: ignore[attr-defined]
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(names), (names, signature)
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ALIGNED]
    options = (
        {"num_warps": 8, "num_stages": propose.n_stages(160_000, generation // 10)}
        if fn is propose._product
        else {}
    )
    source = ASTSource(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    uses_tensor_cores = any(name in compiled.asm["ptx"] for name in ("wgmma", "mma.sync"))
    shared = compiled.metadata.shared
    return {"name": compiled.metadata.name, "shared": shared, "tensor_cores": uses_tensor_cores}


def kernels() -> list[tuple[object, list[str], dict[str, object]]]:
    by_type = [(HALF, 16), (FLOAT, 32)]
    entries = {"BLOCK_ENTRIES": 16}
    found: list[tuple[object, list[str], dict[str, object]]] = [
        (
            propose._product,
            [HALF, HALF, FLOAT, HALF, HALF, *["i32"] * 4],
            {"GROUP": 16, "UPCAST": False, **propose.BLOCKS},
        ),
        (propose._largest, [HALF, INDEX, "i32", "i32"], {"BLOCK": 2048}),
        (
            propose._largest_of_groups,
            [HALF, INDEX, HALF, INDEX, "i32", "i32"],
            {"GROUP": 16, "BLOCK": 64},
        ),
        (sparse._decode, [FLOAT, INDEX, INDEX, FLOAT, FLOAT, "i32"], {**entries, "BLOCK_D": 1024}),
        (sparse._row_products, [FLOAT, FLOAT, INDEX, INDEX, FLOAT, "i32"], {**entries, "BLOCK_D": 256}),
        (
            sparse._pieces,
            [FLOAT, INDEX, INDEX, FLOAT, INDEX, INDEX, INDEX, INDEX, FLOAT, FLOAT, "i32", "i32"],
            {**entries, "PIECE": 64, "BLOCK_D": 1024},
        ),
        (sparse._add_later, [INDEX, INDEX, FLOAT, FLOAT, "i32"], {"BLOCK_D": 1024}),
        (rows._project, [FLOAT, FLOAT, FLOAT, "i32"], {"BLOCK": 1024}),
        (rows._normalise, [FLOAT, "i32"], {"BLOCK": 1024}),
        (threshold._next_digit, [INDEX, INDEX], {}),
    ]
    for values, n_bits in by_type:
        size = {"N_BITS": n_bits, "BLOCK": 4096}
        found += [
            (threshold._histogram, [values, INDEX, INDEX, "i64", "i32"], {**size, "N_BLOCKS": 8}),
            (threshold._count, [values, INDEX, INDEX, INDEX, "i64"], size),
            (threshold._collect, [values, INDEX, INDEX, INDEX, INDEX, "i64"], size),
        ]
    return found


if __name__ == "__main__":
    found = [compile_for(int(sys.argv[1]), fn, types, **values) for fn, types, values in kernels()]
    sys.stdout.write(json.dumps(found))
