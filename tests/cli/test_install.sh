#!/usr/bin/env bash
# cmake --install into a prefix that is then moved: programs, CMake package, module file, data; the recipes in packaging/.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
build=$(cd "$SELM_BIN_DIR/.." && pwd)
source_tree=$SELM_SOURCE_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
programs=(selm_import selm_gen selm_rank selm_logp selm_train selm_iter selm_inspect)
unset LD_LIBRARY_PATH

expect 0 'bin/selm_iter' cmake --install "$build" --prefix "$work/first"
prefix="$work/moved to/selm" # a space: no path may be split
mkdir -p "$(dirname "$prefix")"
mv first "$prefix"

for program in "${programs[@]}"; do
    expect 0 "usage: $program" "$prefix/bin/$program" --help
    expect 0 '^selm [0-9.]+ \(git ' "$prefix/bin/$program" --version
done
libraries=lib
[ -d "$prefix/lib" ] || libraries=lib64
for path in include/selm/algo/losses.hpp $libraries/cmake/selm/selmConfig.cmake $libraries/libselm_text.a share/doc/selm/LICENSE \
    share/doc/selm/RUNNING.md share/selm/scripts/make_smollm2.py; do
    checks=$((checks + 1))
    [ -f "$prefix/$path" ] || fail "$path is not installed"
done
# What jobs/, slurm/ and configs/ hold is installed, executable files as such.
for directory in jobs slurm configs; do
    [ -d "$source_tree/$directory" ] || continue
    expect 0 '' diff -r --exclude=__pycache__ "$source_tree/$directory" "$prefix/share/selm/$directory"
    (cd "$source_tree/$directory" && find . -type f -perm -u+x) >executables
    while read -r file; do
        checks=$((checks + 1))
        [ -x "$prefix/share/selm/$directory/$file" ] || fail "$directory/$file is not executable"
    done <executables
done
expect 0 '^\[' "$prefix/bin/selm_iter" --config "$prefix/share/selm/configs/smollm2_135m.cfg" --print-config

# Nothing in the package remembers where it was installed first, nor the source or build tree (wheels excepted).
checks=$((checks + 1))
if grep -rnF -e "$work/first" -e "$source_tree/include" -e "$source_tree/src" -e "$build" "$prefix/$libraries/cmake" "$prefix/share"; then
    fail "an absolute path of this build is in the installed package"
fi

# --- projects that use it
consumer() {
    local directory=$1 components=$2
    shift 2
    cmake -S "$source_tree/tests/packaging/consumer" -B "$directory" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" \
        "-DCONSUMER_COMPONENTS=$components" "$@"
}
expect 0 'Generating done' consumer light 'text;algo' -DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON -DCMAKE_DISABLE_FIND_PACKAGE_HDF5=ON
expect 0 '' cmake --build light
expect 0 '^<\|assistant\|>$' light/consumer_light
expect_count 1 '^loss 0\.693147$'
expect 0 'Generating done' consumer full phases
expect 0 '' cmake --build full
expect 1 'error: .*absent.h5' full/consumer_full absent.h5
expect 1 "selm has no module 'nonsense'" consumer wrong nonsense
mkdir other
sed 's/find_package(selm 0.1 /find_package(selm 9.9 /' "$source_tree/tests/packaging/consumer/CMakeLists.txt" >other/CMakeLists.txt
expect 1 'requested version "9.9"' cmake -S other -B other/build -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCONSUMER_COMPONENTS=algo

# --- the module file, where Lmod is installed
lmod=${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash
if [ -f "$lmod" ]; then
    module_load() {
        set +eu
        # shellcheck disable=SC1090
        source "$lmod"
        module use "$prefix/share/selm/modulefiles"
        module load selm
        command -v selm_gen
        echo "root $SELM_ROOT"
        echo "libraries $LD_LIBRARY_PATH"
        selm_gen --version
    }
    # Lmod splits paths at spaces in some shells: sites have none in their prefixes.
    mv "$prefix" "$work/plain"
    prefix=$work/plain
    expect 0 "^root $work/plain$" module_load
    expect_count 1 "^$work/plain/bin/selm_gen$"
    expect_count 1 '^selm [0-9.]+ \(git '
    expect_count 1 "^libraries $work/plain/$libraries(:|$)"
else
    echo "not checked: the module file (Lmod is not installed)"
fi

expect 0 'recipes agree' python3 "$source_tree/tests/packaging/check_recipes.py" "$source_tree"
finish
