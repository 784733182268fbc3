#!/usr/bin/env bash
# Runs a bundle on emulated ARM64 processors and compares its answers with this machine's.
#
#   tests/portable/arm64.sh BUNDLE [WORK]
#
# Needs qemu-user-static, apt-get (Debian or Ubuntu; nothing is installed on the system), pip, and about 250 MB in
# WORK, which is kept: a second run fetches nothing. Processors: Cortex-A53 (Raspberry Pi 3; no dot product) and
# Cortex-A76 (Raspberry Pi 5). Exit code 0: every label and rationale is equal.
set -euo pipefail
bundle=$(realpath "$1")
here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
work=$(realpath -m "${2:-$repository/runs/arm64}")
python=${PYTHON:-python3}
command -v qemu-aarch64-static >/dev/null || { echo "qemu-aarch64-static is missing: apt-get install qemu-user-static" >&2; exit 2; }
mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/debs"

if [ ! -x "$work/root/usr/bin/python3" ]; then
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$work/apt"
    -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o Dir::State::status=/dev/null
    -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1)
  "${apt[@]}" update
  wanted=$("${apt[@]}" -s -o APT::Install-Recommends=false install python3-minimal python3 libstdc++6 zlib1g \
    | awk '$1 == "Inst" { print $2 }' | sort -u)
  (cd "$work/debs" && "${apt[@]}" download $wanted)
  for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/root"; done
  [ -e "$work/root/lib" ] || ln -s usr/lib "$work/root/lib"
fi
interpreter=$(cd "$work/root/usr/bin" && ls python3.[0-9]* | grep -E '^python3\.[0-9]+$' | tail -n 1)

if [ ! -d "$work/site/onnxruntime" ]; then
  platforms=()
  for glibc in 2_28 2_27 2_26 2_17 2014; do
    platforms+=(--platform "manylinux${glibc/#2_/_2_}_aarch64")
  done
  "$python" -m pip install --quiet --quiet --no-compile --target "$work/site" --only-binary=:all: \
    --implementation cp --python-version "${interpreter#python}" "${platforms[@]}" \
    numpy tokenizers typer rich pydantic pyyaml onnxruntime
fi
"$python" -m pip list --path "$work/site" | grep -E '^(numpy|tokenizers|onnxruntime) '

# onnxruntime reads the processor's name from /proc/cpuinfo, where the emulator would show this machine's.
describe() { # processor, part number, features
  local prefix=$work/prefix-$1
  mkdir -p "$prefix/proc" "$prefix/sys/devices/system/cpu"
  ln -sfn "$work/root/lib" "$prefix/lib"
  ln -sfn "$work/root/usr" "$prefix/usr"
  for number in 0 1; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 4\n\n' \
      "$number" "$3" "$2"
  done > "$prefix/proc/cpuinfo"
  for list in present possible online; do echo 0-1 > "$prefix/sys/devices/system/cpu/$list"; done
}
plain="fp asimd evtstrm crc32 cpuid"
describe cortex-a53 0xd03 "$plain"
describe cortex-a76 0xd0b "$plain atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"

texts='["zone 3 reads 31.5 degrees and the valve is open", "the fan is off and the filter is dirty", "short"]'
targets=$("$python" -c 'import json, sys; print(*[n for n in json.load(open(sys.argv[1]))["targets"] if n.startswith("cpu")])' "$bundle/manifest.json")
for target in $targets; do
  PYTHONPATH="$repository" "${NATIVE_PYTHON:-$repository/.venv/bin/python}" "$here/answers.py" "$bundle" "$target" "$texts" > "$work/native.json"
  for processor in cortex-a53 cortex-a76; do
    PYTHONHOME="$work/root/usr" PYTHONPATH="$repository:$work/site" PYTHONDONTWRITEBYTECODE=1 \
      qemu-aarch64-static -L "$work/prefix-$processor" -cpu "$processor" "$work/root/usr/bin/$interpreter" \
      "$here/answers.py" "$bundle" "$target" "$texts" > "$work/$processor.json"
    "$python" "$here/compare_answers.py" "$work/native.json" "$work/$processor.json" "$target, $processor"
  done
done
