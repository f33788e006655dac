#!/bin/sh
# The runtime's tests on 64-bit ARM (NEON), emulated: an hour for all of them on one core, seconds say nothing.
#   tests/arm64.sh [arguments of pytest]        # needs make, Debian's debootstrap qemu-user-static g++-aarch64-linux-gnu
# Kernels are cross-compiled, Python and its headers come from Debian for arm64, compiled packages from their wheels for it;
# what is pure Python comes from the virtual environment here.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-$here/.venv}
work=${WORK:-$here/build/arm64}
python=$venv/bin/python
root=$work/root site=$work/site app=$work/app
mkdir -p "$work"

if ! test -e "$work/.root"; then
  rm -rf "$root"
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libpython3.11-dev bookworm "$root" > "$work/debootstrap.log"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
  touch "$work/.root"
fi

if ! test -e "$work/.site"; then  # torch: the newest that has both it and torchvision as wheels for CPUs here
  rm -rf "$site"
  "$python" -m pip install --quiet --disable-pip-version-check --target "$site" --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 \
    torch==2.9.1 torchvision==0.24.1 numpy safetensors pillow pyyaml markupsafe scipy scikit-learn matplotlib contourpy kiwisolver \
    "hypothesis==$("$python" -c 'import hypothesis; print(hypothesis.__version__)')"
  touch "$work/.site"
fi

cat > "$work/toolchain.cmake" << 'END'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
END
# Debian's header looks for the one of its architecture; the C library's headers must be those of the compiler.
mkdir -p "$work/include/aarch64-linux-gnu"
cp -r "$root/usr/include/python3.11" "$work/include/"
cp -r "$root/usr/include/aarch64-linux-gnu/python3.11" "$work/include/aarch64-linux-gnu/"
"$python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" nanobind scikit-build-core cmake ninja
PATH=$venv/bin:$PATH
cmake -G Ninja -S "$here" -B "$work/objects" -DCMAKE_TOOLCHAIN_FILE="$work/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" -DPython_EXECUTABLE="$python" \
  -DPython_INCLUDE_DIR="$work/include/python3.11" -DCMAKE_CXX_FLAGS="-I$work/include" \
  -DSKBUILD_PROJECT_NAME=afds -DSKBUILD_PROJECT_VERSION=0 -DSKBUILD_STATE=wheel > "$work/cmake.log"
cmake --build "$work/objects"
rm -rf "$app"
mkdir -p "$app"
cp -r "$here/src/afds" "$app/"
cp "$work"/objects/_kernels*.so "$app/afds/runtime/_kernels.cpython-311-aarch64-linux-gnu.so"

cd "$here"
export PYTHONHOME="$root/usr" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTHONPATH="$app:$site:$(env -u PYTHONHOME "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
export PYTHONPATH
exec qemu-aarch64-static -L "$root" -E LD_LIBRARY_PATH="$root/usr/lib/aarch64-linux-gnu" "$root/usr/bin/python3.11" \
  -m pytest -p no:cacheprovider "${@:-tests/test_runtime.py}"
