"""Spack recipe of selm. As a repository: spack repo add packaging/spack"""

import glob
import os

from spack.package import *

try:  # build systems moved out of spack.package with Spack 1.0
    from spack_repo.builtin.build_systems.cmake import CMakePackage
    from spack_repo.builtin.build_systems.cuda import CudaPackage
except ImportError:
    pass


class Selm(CMakePackage, CudaPackage):
    """Self-Exploring Language Models on clusters: iterative, optimistic preference optimisation of language models as
    batch programs on MPI ranks, with Hugging Face checkpoints in and out and parallel HDF5 in between."""

    # No release has been published: there is neither an address nor a checksum. `spack develop` (see spack.yaml) builds
    # the source tree that this file is in. A site with a mirror writes its address into `git`.
    homepage = "https://arxiv.org/abs/2405.19332"

    maintainers("selm-maintainers")
    license("Apache-2.0", checked_by="selm-maintainers")

    version("main", branch="main")
    version("0.1.0")

    variant("native", default=False, description="Compile for the instruction set of the building machine")
    variant("tests", default=False, description="Build the tests")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("cmake@3.25:", type="build")
    depends_on("ninja", type="build")
    depends_on("git", type="build")

    depends_on("mpi")
    depends_on("hdf5@1.10:+mpi")
    depends_on("boost@1.74:+program_options")
    depends_on("nlohmann-json@3.11:")
    depends_on("kokkos@3.4:+serial")
    depends_on("libxsmm@1.17")
    depends_on("pcre2")
    depends_on("sentencepiece")
    depends_on("xxhash@0.8:")
    depends_on("arrow+parquet+snappy+zstd")
    depends_on("py-torch@2.1:")
    depends_on("googletest@1.12:", type=("build", "link"), when="+tests")
    depends_on("python@3.9:", type="build", when="+tests")

    # CUDA arithmetic is LibTorch's: it must have been built for the same GPUs.
    with when("~cuda"):
        depends_on("py-torch~cuda")
    with when("+cuda"):
        depends_on("cuda@12:")
        for arch in CudaPackage.cuda_arch_values:
            depends_on(f"py-torch+cuda cuda_arch={arch}", when=f"cuda_arch={arch}")

    conflicts("cuda_arch=none", when="+cuda", msg="+cuda needs cuda_arch, for example cuda_arch=90")
    conflicts("%gcc@:11", msg="selm is C++20 as GCC 12 and later have it")

    sanity_check_is_file = [
        "bin/selm_import",
        "bin/selm_gen",
        "bin/selm_rank",
        "bin/selm_logp",
        "bin/selm_train",
        "bin/selm_iter",
        "bin/selm_inspect",
    ]
    sanity_check_is_dir = ["include/selm", "share/selm/configs"]

    generator("ninja")

    def cmake_args(self):
        # site-packages that holds torch/: the programs link its C++ libraries, Python is not run.
        torch = glob.glob(join_path(self.spec["py-torch"].prefix, "lib*", "python3*", "site-packages", "torch"))
        if not torch:
            raise InstallError("py-torch has no site-packages/torch")
        args = [
            self.define("SELM_PYTHON_SITE", os.path.dirname(torch[0])),
            self.define("HDF5_ROOT", self.spec["hdf5"].prefix),
            self.define_from_variant("SELM_NATIVE", "native"),
            self.define_from_variant("SELM_BUILD_TESTS", "tests"),
            self.define_from_variant("SELM_ENABLE_CUDA", "cuda"),
        ]
        if self.spec.satisfies("+cuda"):
            archs = self.spec.variants["cuda_arch"].value
            args.append(self.define("CMAKE_CUDA_ARCHITECTURES", ";".join(archs)))
            # 90 is 9.0, 90a is 9.0a, 100 is 10.0
            dotted = [f"{a.rstrip('af')[:-1]}.{a[len(a.rstrip('af')) - 1:]}" for a in archs]
            args.append(self.define("TORCH_CUDA_ARCH_LIST", ";".join(dotted)))
        return args

    def setup_run_environment(self, env):
        env.set("SELM_ROOT", self.prefix)

    def test_version(self):
        """the programs start and say their version"""
        for name in self.sanity_check_is_file:
            program = Executable(join_path(self.prefix, name))
            check_outputs("selm", program("--version", output=str.split, error=str.split))
