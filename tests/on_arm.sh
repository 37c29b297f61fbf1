#!/usr/bin/env bash
# The C++ kernels on AArch64, emulated: cross-compiles them, with the NEON that every such core has, and runs the tests
# of the ops and of the engine. For who has no such machine: there `make test` does it.
#
#   tests/on_arm.sh FOLDER [tests...]      FOLDER keeps 1.3 GB of packages from run to run
#
# Wants Debian or Ubuntu with `apt install qemu-user-static g++-aarch64-linux-gnu` and, for the packages of that machine,
# `dpkg --add-architecture arm64 && apt update`.
set -euo pipefail
folder=$(realpath -m "${1:?say where to keep the packages of the other machine, see the top of this file}")
shift
source=$(realpath "$(dirname "$0")/..")
root=$folder/root packages=$folder/packages copy=$folder/source
for tool in qemu-aarch64-static aarch64-linux-gnu-g++ apt-get dpkg; do
    command -v $tool >/dev/null || { echo "$0: $tool not found: see the top of this file" >&2; exit 1; }
done

if [ ! -x "$root/usr/bin/python3" ]; then  # Python and what it links
    mkdir -p "$folder/debs/partial" "$root"
    : >"$folder/none"
    apt-get install --yes --quiet --download-only --no-install-recommends -o Dir::State::status="$folder/none" \
        -o Dir::Cache::archives="$folder/debs" -o APT::Architecture=arm64 -o APT::Architectures::=arm64 \
        python3 libpython3-dev libgomp1 libstdc++6
    for package in "$folder"/debs/*.deb; do dpkg -x "$package" "$root"; done
fi
libraries=$root/usr/lib/aarch64-linux-gnu:$root/lib/aarch64-linux-gnu
python() {
    qemu-aarch64-static -L "$root" -E LD_LIBRARY_PATH="$libraries" -E PYTHONPATH="$packages" \
        -E PYTHONDONTWRITEBYTECODE=1 "$root/usr/bin/python3" "$@"
}
version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ ! -d "$packages/transformers" ]; then
    install=("${PYTHON:-python3}" -m pip install --quiet --target "$packages" --only-binary=:all: --upgrade
             --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none
             --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64)
    "${install[@]}" --no-deps torch==2.10.0  # the oldest that is served; later ones want CUDA there
    "${install[@]}" transformers safetensors pytest hypothesis psutil scipy sympy networkx jinja2
fi

rm -rf "$copy" "$folder/objects"
mkdir -p "$copy" "$folder/objects"
cp -r "$source"/{csrc,kernels,speckv,tests,pyproject.toml} "$copy"
rm -f "$copy"/kernels/_C*.so
ln -s ../kernels "$copy/speckv/kernels"
# As setup.py and torch.utils.cpp_extension have them.
flags=(-std=c++17 -O3 -g0 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -fvisibility=hidden
       -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 -DTORCH_EXTENSION_NAME=_C
       -DTORCH_API_INCLUDE_EXTENSION_H -I"$packages/torch/include" -I"$packages/torch/include/torch/csrc/api/include"
       -I"$root/usr/include/python$version" -I"$root/usr/include")
for file in "$copy"/csrc/*.cpp; do
    aarch64-linux-gnu-g++ "${flags[@]}" -c "$file" -o "$folder/objects/$(basename "$file" .cpp).o"
done
aarch64-linux-gnu-g++ -shared "$folder"/objects/*.o -L"$packages/torch/lib" -lc10 -ltorch_cpu -ltorch \
    -Wl,--allow-shlib-undefined -o "$copy/kernels/_C.abi3.so"

cd "$copy"
python -c 'import platform; from speckv.kernels import serving; print(platform.machine(), *serving()["cpu"])'
# Not those that start processes of their own, which would need the emulator too.
[ $# -gt 0 ] || set -- --ignore=tests/ops/test_backends.py tests/ops tests/test_engine.py tests/test_head_engine.py \
    tests/test_draft_chain.py
python -m pytest -q -p no:cacheprovider -o addopts= "$@"
