"""Every shipped tile built ahead of time for every architecture: tensor cores used, nothing spilled, it fits.

No GPU is needed: Triton compiles for a named target and bundles NVIDIA's assembler.
"""

import re
import subprocess
from pathlib import Path

import pytest

from sbs_edge.kernels import tile_table

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.compiled

FLOATS = {"scale", "softcap", "on_target", "elsewhere", "smoothing", "z_loss"}
KERNELS = (
    ("partial_softmax", False),
    ("partial_softmax", True),
    ("logits_grad", False),
)  # and whether it keeps
INTEGERS = {"n_rows", "n_columns", "n_classes", "tiles_a_strip", "n_strips", "n_tiles", "base"}
STRIDES = {"width", "stride_hn", "stride_wv", "grads_stride", "stats_stride", "kept_stride"}
POINTERS = {
    "indices": "*i64", "targets": "*i64", "partials": "*fp32", "losses": "*fp32", "hits": "*i8",
    "stats": "*fp32", "factors": "*fp32", "sums": "*fp32", "peaks": "*fp32", "shares": "*fp32", "gains": "*fp32",
}  # fmt: skip


def _build(name, capability, kind, tile, *, options=False, aligned=True, keep=False, **changed):
    """The kernel as a launch with these arguments would build it: aligned pointers and strides, or none."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sbs_edge.kernels import tiles

    kernel = getattr(tiles, name)
    constants = {
        "HAS_BIAS": options, "HAS_CAP": options, "SUM": options, "KEEP": keep,
        "CARRY": options and not keep, "COUNT": True, "EVEN_V": aligned and not options, "EVEN_D": aligned,
        "PRECISION": "ieee", "BLOCK_S": 64, "CHUNK": 16,
        "BLOCK_N": tile.rows, "BLOCK_V": tile.columns, "BLOCK_D": tile.depth,
        "TILE_V": tile.columns,
    }  # fmt: skip
    constants |= changed
    if keep:  # a soft cap is refused there
        constants["HAS_CAP"] = False
    if aligned:
        constants |= {"stride_hd": 1, "stride_wd": 1}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        elif argument in INTEGERS | STRIDES or argument.startswith("stride_"):
            signature[argument] = "i32"
        else:
            signature[argument] = POINTERS.get(argument, f"*{kind}")
        if aligned and (argument in STRIDES or signature[argument].startswith("*")):
            attributes[position,] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    cap = {}
    if name == "partial_softmax":
        cap = tile_table.register_cap(capability, 4 if kind == "fp32" else 2, tile, constants)
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, **cap},
    )


def _resources(built, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes of stack and local memory, as the assembler reports them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    image = folder / "kernel.cubin"
    image.write_bytes(built.asm["cubin"])
    shown = subprocess.run(
        [tools / "cuobjdump", "-res-usage", image], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def _check(name, capability, kind, tile, folder, stack=0, **variant):
    built = _build(name, capability, kind, tile, **variant)
    used = _resources(built, folder)
    where = f"{name} {kind} {tuple(tile)} sm_{capability} {variant}: {used}"
    assert used["STACK"] <= stack, where
    assert used["LOCAL"] == 0, where
    assert used["REG"] * tile.warps * 32 <= 65536, where
    assert built.metadata.shared <= tile_table.SHARED_LIMIT[capability], where
    products = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma" if kind != "fp32" else r"fma\.rn(\.ftz)?\.f32"
    assert re.search(products, built.asm["ptx"]), where
    if capability in (100, 103) and kind != "fp32" and tile.rows >= 64:
        assert "tcgen05.mma" in built.asm["ptx"], where
    if capability == 90 and kind != "fp32" and tile.rows >= 64:
        assert "wgmma.mma_async" in built.asm["ptx"], where


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("capability", tile_table.ARCHITECTURES)
def test_the_first_choice_builds(capability, cache):
    tile = tile_table.pick(capability, 2, 4096)
    for name, keep in KERNELS:
        _check(name, capability, "bf16", tile, cache, keep=keep)
    wide = tile._replace(columns=4096, warps=4)  # of a row
    spread = _resources(_build("probs_to_grad", capability, "bf16", wide), cache)
    assert spread["REG"] <= 128
    assert spread["STACK"] == spread["LOCAL"] == 0
    row = tile._replace(depth=256, warps=4)
    for options in (False, True):
        settle = _resources(_build("combine_partials", capability, "bf16", row, options=options), cache)
        assert settle["REG"] <= 128
        assert settle["STACK"] == settle["LOCAL"] == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", tile_table.ARCHITECTURES)
def test_every_shipped_tile_builds_with_and_without_every_option(capability, kind, cache):
    itemsize = 4 if kind == "fp32" else 2
    for name, keep in KERNELS:
        for tile in tile_table.candidates(capability, itemsize, "kept" if keep else "softmax"):
            roomy = tile_table.fits_options(tile)
            for options in (False, True)[: 1 + roomy] if roomy or not keep else ():
                _check(name, capability, kind, tile, cache, options=options, keep=keep)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_unaligned_and_strided_inputs_build_too(kind, cache):
    for name in ("partial_softmax", "logits_grad"):
        tile = tile_table.pick(80, 4 if kind == "fp32" else 2, 4096)
        _check(name, 80, kind, tile, cache, stack=32, aligned=False)  # a few words


def test_offsets_into_the_matrices_are_64_bit(cache):
    """A stride that does not fit 31 bits arrives as such; one that does is widened before it is multiplied."""
    for name in ("partial_softmax", "logits_grad"):
        text = _build(name, 80, "bf16", tile_table.pick(80, 2, 4096), aligned=False).asm["ttir"]
        widths = {
            argument: re.search(rf"%{argument}: (i\d+)", text).group(1)
            for argument in ("stride_hn", "n_columns")
        }
        assert widths == {"stride_hn": "i32", "n_columns": "i32"}
        matrix = re.findall(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<bf16>>, tensor<\d+x\d+xi(\d+)>", text)
        assert matrix.count("64") >= 4
        # the one narrow offset is a column within a row of the slopes
        assert matrix.count("32") == (1 if name == "logits_grad" else 0)


CAPPED = [
    {"CARRY": True}, {"EVEN_V": False}, {"EVEN_D": False}, {"SUM": True}, {"CARRY": True, "EVEN_V": False},
    {"CARRY": True, "EVEN_D": False}, {"CARRY": True, "EVEN_V": False, "EVEN_D": False},
    {"EVEN_V": False, "EVEN_D": False},
]  # fmt: skip


@pytest.mark.parametrize("changed", [{}, *CAPPED], ids=lambda x: "+".join(x) or "plain")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_two_blocks_of_hopper_s_first_tile_fit_a_multiprocessor(kind, changed, cache):
    tile = tile_table.pick(90, 2, 4096)
    built = _build("partial_softmax", 90, kind, tile, **changed)
    used = _resources(built, cache)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 128, used
    assert 2 * built.metadata.shared <= tile_table.SHARED_LIMIT[90]
    assert "wgmma.mma_async" in built.asm["ptx"]
    if changed:
        with tile_table.tuned(cap_registers=False):
            assert _resources(_build("partial_softmax", 90, kind, tile, **changed), cache)["REG"] > 128
