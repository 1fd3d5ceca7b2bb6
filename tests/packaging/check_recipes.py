#!/usr/bin/env python3
"""Checks the recipes in packaging/ against the build: syntax, version, options, programs.

usage: check_recipes.py SOURCE_TREE

The Spack recipe and the EasyBuild file run as Python, the former against stand-ins for Spack's directives that record their calls.
What Spack, EasyBuild and Apptainer themselves make of them is not checked here.
"""

import re
import sys
import types
from pathlib import Path

problems = []


def check(condition, message):
    if not condition:
        problems.append(message)


class Recorder:
    """Stands for a Spack directive or helper: remembers arguments, works as a context and as a decorator."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def read_spack(path):
    """The recipe's class and its directives' calls by name."""
    names = ("maintainers license version variant depends_on conflicts generator when join_path InstallError "
             "Executable check_outputs").split()
    directives = {name: Recorder() for name in names}
    module = types.ModuleType("spack.package")
    vars(module).update(directives)
    module.CMakePackage = type("CMakePackage", (), {})
    module.CudaPackage = type("CudaPackage", (), {"cuda_arch_values": ("80", "90", "90a", "100")})
    sys.modules["spack"] = types.ModuleType("spack")
    sys.modules["spack.package"] = module
    scope = {"__name__": "recipe"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["Selm"], {name: recorder.calls for name, recorder in directives.items()}


def cuda_arguments(recipe):
    """What cmake_args() passes for three GPU architectures."""
    instance = recipe()
    chosen = types.SimpleNamespace(value=("80", "90a", "100"))

    class Spec(dict):
        variants = {"cuda_arch": chosen}

        def satisfies(self, _):
            return True

    prefix = types.SimpleNamespace(prefix="/p")
    instance.spec = Spec({"py-torch": prefix, "hdf5": prefix})
    instance.define = lambda name, value: f"{name}={value}"
    instance.define_from_variant = lambda name, variant: f"{name}<{variant}>"
    recipe.cmake_args.__globals__["glob"] = types.SimpleNamespace(glob=lambda _: ["/p/lib/python3.11/site-packages/torch"])
    return instance.cmake_args()


def main(tree):
    cmake = (tree / "CMakeLists.txt").read_text()
    version = re.search(r"project\(selm VERSION ([0-9.]+)", cmake).group(1)
    options = set(re.findall(r"^(?:option|set)\((SELM_\w+)", cmake, re.M))
    programs = {path.stem for path in (tree / "src/apps").glob("selm_*.cpp")}

    recipe, calls = read_spack(tree / "packaging/spack/packages/selm/package.py")
    check(((version,), {}) in [(args, {}) for args, _ in calls["version"]], f"spack: no version {version}")
    check({Path(name).stem for name in recipe.sanity_check_is_file} == programs, "spack: other programs than src/apps has")
    arguments = cuda_arguments(recipe)
    variants = {args[0] for args, _ in calls["variant"]} | {"cuda"}
    for argument in arguments:
        name, variant = re.match(r"(\w+)(?:<(\w+)>)?", argument).groups()
        check(not name.startswith("SELM_") or name in options, f"spack: {name} is no option of CMakeLists.txt")
        check(variant is None or variant in variants, f"spack: {name} follows variant {variant}, which does not exist")
    check("TORCH_CUDA_ARCH_LIST=8.0;9.0a;10.0" in arguments, f"spack: wrong GPU architectures in {arguments}")
    check("SELM_PYTHON_SITE=/p/lib/python3.11/site-packages" in arguments, f"spack: wrong site-packages in {arguments}")
    check(all("msg" in kwargs for _, kwargs in calls["conflicts"]), "spack: a conflict says no reason")
    check(f"selm@{version}" in (tree / "packaging/spack/spack.yaml").read_text(), f"spack.yaml does not ask for selm@{version}")

    files = list((tree / "packaging/easybuild").glob("*.eb"))
    check(len(files) == 1, f"easybuild: one file is expected, not {len(files)}")
    for path in files:
        scope = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        toolchain = scope["toolchain"]
        expected = f"{scope['name']}-{version}-{toolchain['name']}-{toolchain['version']}.eb"
        check(scope["version"] == version and path.name == expected, f"easybuild: {path.name} should be {expected}")
        check({Path(name).stem for name in scope["sanity_check_paths"]["files"]} == programs, "easybuild: other programs")
        for name in re.findall(r"-D(SELM_\w+)", scope["configopts"]):
            check(name in options, f"easybuild: {name} is no option of CMakeLists.txt")

    definition = (tree / "packaging/apptainer/selm.def").read_text()
    for name in re.findall(r"-D(SELM_\w+)", definition):
        check(name in options, f"apptainer: {name} is no option of CMakeLists.txt")
    check(f"image.version {version}\n" in definition, f"apptainer: the label's version is not {version}")
    for name in programs:
        check(re.search(rf"^    for program in .*\b{name}\b", definition, re.M), f"apptainer: %test does not start {name}")
    copied = re.findall(r"^    (\S+) /opt/selm-source/(\S+)$", definition, re.M)
    check(len(copied) > 10 and all(a == b for a, b in copied), "apptainer: %files copies something to another name")
    build_files = "".join(path.read_text() for path in (tree / "cmake").glob("selm_*.cmake"))
    for name in re.findall(r"\$\{CMAKE_SOURCE_DIR\}/(\w[\w.]*)", build_files):
        present = name in ("tests", "build") or (name, name) in copied
        check(present, f"apptainer: the build reads {name}, which %files does not copy")

    for problem in problems:
        print(f"FAILED: {problem}")
    if not problems:
        print(f"recipes agree with version {version} and {len(programs)} programs")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
