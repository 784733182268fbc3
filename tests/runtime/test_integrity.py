"""A bundle that is not exactly what its manifest says is refused, before any graph is opened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.external_data import external_locations
from sbs_edge.runtime.student import Student

BUNDLE_FILES = (
    "manifest.json", "manifest.json.sha256", "tokenizer.json",
    "cpu-fp32/label_scorer.onnx", "cpu-fp32/weights.bin", "cpu-int8/explainer.onnx",
)  # fmt: skip


def reseal(root: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest as an attacker would: with a digest that fits."""
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    (root / "manifest.json").write_bytes(content)
    (root / "manifest.json.sha256").write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n")


@pytest.fixture
def no_graph_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a graph reaches the runtime."""
    import onnxruntime

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a graph was opened before the digests were checked")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def test_an_untouched_bundle_opens(tiny_bundle: Path) -> None:
    assert Bundle.open(tiny_bundle).manifest["name"] == "tiny"


@pytest.mark.usefixtures("no_graph_is_opened")
@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_flips_of_single_bits_are_refused(own_bundle: Path, name: str) -> None:
    path = own_bundle / name
    content = path.read_bytes()
    # Every byte of the small files, a spread of the large ones: SHA-256 does not care where.
    places = range(len(content)) if len(content) <= 128 else random.Random(1).sample(range(len(content)), 60)
    for place in [0, len(content) - 1, *places]:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            Student.load(own_bundle)
    path.write_bytes(content)
    assert Bundle.open(own_bundle)


@pytest.mark.usefixtures("no_graph_is_opened")
@pytest.mark.parametrize("name", BUNDLE_FILES)
@pytest.mark.parametrize("left", [0, 1, 63, -1])
def test_truncated_and_grown_files_are_refused(own_bundle: Path, name: str, left: int) -> None:
    path = own_bundle / name
    content = path.read_bytes()
    path.write_bytes(content[:left])
    with pytest.raises(IntegrityError):
        Student.load(own_bundle)
    path.write_bytes(content + b"\n")
    with pytest.raises(IntegrityError):
        Student.load(own_bundle)


@pytest.mark.usefixtures("no_graph_is_opened")
@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_missing_file_is_refused(own_bundle: Path, name: str) -> None:
    (own_bundle / name).unlink()
    with pytest.raises(IntegrityError):
        Student.load(own_bundle)


@pytest.mark.parametrize(
    "name", ["extra.bin", "cpu-fp32/extra.onnx", ".hidden", "new/deep/file", "MANIFEST.JSON"]
)
def test_an_extra_file_is_refused(own_bundle: Path, name: str) -> None:
    path = own_bundle / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(IntegrityError, match="does not list"):
        Bundle.open(own_bundle)


TRAVERSAL = [
    "/etc/passwd", "../outside.bin", "cpu-fp32/../../outside.bin", "..", ".", "./tokenizer.json", "cpu-fp32//weights.bin",
    "a/./b", "a\\b", "..\\outside.bin", "C:\\x", "C:x", "\\\\host\\share", "nul\0byte", "line\nbreak", "tab\t", "",
    "/", "//x", "a/..", "del\x7f", "cpu-fp32/", " /../x", "~/../x/..", "%2e%2e/../x", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSAL)
def test_names_that_leave_the_directory_are_refused(own_bundle: Path, name: str) -> None:
    content = b"outside"
    (own_bundle.parent / "outside.bin").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(own_bundle, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(IntegrityError):
        Bundle.open(own_bundle)
    with pytest.raises(IntegrityError):
        Bundle.open(own_bundle, verify=False).member(name)


def _swap_for(path: Path, kind: str) -> None:
    content = path.read_bytes()
    outside = path.parents[1] / "outside"
    outside.write_bytes(content)
    path.unlink()
    if kind == "symlink":
        path.symlink_to(outside)
    elif kind == "relative symlink":
        path.symlink_to(os.path.relpath(outside, path.parent))
    elif kind == "hard link":
        os.link(outside, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's path is at most about 100 bytes
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device needs root")


@pytest.mark.parametrize(
    "kind", ["symlink", "relative symlink", "hard link", "fifo", "directory", "socket", "device"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "manifest.json.sha256"])
def test_anything_but_a_plain_file_is_refused(own_bundle: Path, kind: str, name: str) -> None:
    _swap_for(own_bundle / name, kind)
    with pytest.raises(IntegrityError):
        Bundle.open(own_bundle)


def test_a_linked_directory_is_refused(own_bundle: Path) -> None:
    (own_bundle / "cpu-fp32").rename(own_bundle.parent / "elsewhere")
    (own_bundle / "cpu-fp32").symlink_to(own_bundle.parent / "elsewhere")
    with pytest.raises(IntegrityError):
        Bundle.open(own_bundle)
    (own_bundle / "cpu-fp32").unlink()
    (own_bundle.parent / "elsewhere").rename(own_bundle / "cpu-fp32")
    (own_bundle / "empty-link").symlink_to(own_bundle.parent)
    with pytest.raises(IntegrityError, match="link"):
        Bundle.open(own_bundle)


@pytest.mark.parametrize(
    "name", ["Tokenizer.JSON", "CPU-fp32/other.bin", "cafe\u0301", "cpu-fp32/weights.BIN"]
)
def test_names_that_clash_where_case_is_folded_are_refused(own_bundle: Path, name: str) -> None:
    for extra in (name, "caf\u00e9"):
        path = own_bundle / extra
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    seal(own_bundle, json.loads((own_bundle / "manifest.json").read_text()))
    with pytest.raises(IntegrityError, match="twice"):
        Bundle.open(own_bundle)


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../../outside.bin", "..\\x", "missing.bin", "../tokenizer.json", ""]
)
@pytest.mark.parametrize("where", ["initializer", "loop body", "attribute"])
def test_constants_from_outside_are_refused(own_bundle: Path, location: str, where: str) -> None:
    path = own_bundle / "cpu-fp32" / "explainer.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = onnx.TensorProto(name="stolen", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "loop body":
        loop.attribute[0].g.initializer.append(tensor)
    else:
        constant = loop.attribute[0].g.node.add(op_type="Constant", output=["stolen"])
        constant.attribute.append(onnx.helper.make_attribute("value", tensor))
    path.write_bytes(model.SerializeToString())
    seal(own_bundle, json.loads((own_bundle / "manifest.json").read_text()))
    with pytest.raises(IntegrityError, match="constants from"):
        Bundle.open(own_bundle)


def test_locations_agree_with_onnx_itself(tiny_bundle: Path) -> None:
    for path in sorted(tiny_bundle.rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        expected = {
            entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
        }  # fmt: skip
        assert "weights.bin" in expected
        assert all((path.parent / location).is_file() for location in expected)
        assert external_locations(path.read_bytes(), path.name) == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_refused(content: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        external_locations(content, "graph")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "format", "task", "prefixes", "limits", "labels", "targets", "default_target", "model", "files", "calibration",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=JSON_VALUES, inside=st.booleans(), data=st.data())
def test_any_manifest_is_read_or_refused(
    tiny_bundle: Path, tmp_path: Path, field, value, inside, data
) -> None:
    """With a fitting digest: what is not a manifest is refused, never a KeyError deep in the runtime."""
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    if inside and isinstance(manifest[field], dict) and manifest[field]:
        manifest[field][data.draw(st.sampled_from(sorted(manifest[field])))] = value
    else:
        manifest[field] = value
    root = tmp_path / "fuzzed"
    root.mkdir(exist_ok=True)
    content = json.dumps(manifest).encode()
    (root / "manifest.json").write_bytes(content)
    (root / "manifest.json.sha256").write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n")
    with pytest.raises(IntegrityError):  # at the latest: none of the files is there
        Bundle.open(root)


def test_later_formats_are_refused_with_the_remedy(own_bundle: Path) -> None:
    reseal(own_bundle, lambda manifest: manifest.update(format=2))
    with pytest.raises(IntegrityError, match="Upgrade sbs-edge"):
        Bundle.open(own_bundle)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, said in (("absent", "no such directory"), ("file", "it is a file")):
        with pytest.raises(UsageError, match=f"is not a bundle: .*{said}"):
            Bundle.open(tmp_path / name)
    with pytest.raises(IntegrityError, match="is not a bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(IntegrityError):
        Bundle.open(tmp_path)
    assert IntegrityError.exit_code == 4
