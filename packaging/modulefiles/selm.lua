-- Lmod module of an installed selm. `cmake --install` puts it into PREFIX/share/selm/modulefiles/selm/VERSION.lua, where it
-- finds the prefix from its own place:
--   module use PREFIX/share/selm/modulefiles && module load selm
-- Copied elsewhere, it needs the prefix written into `root`. Sites: name the modules selm was built with in `needs`.
local root = myFileName():match("^(.*)/share/selm/modulefiles/")
local needs = {} -- for example { "openmpi/4.1.6", "hdf5/1.14.3" }

if root == nil then
    LmodError("selm: this module file is not in PREFIX/share/selm/modulefiles/selm. Write the prefix into `root`: ", myFileName())
end

whatis("Name: selm")
whatis("Version: " .. myModuleVersion())
whatis("Category: machine learning, batch")
whatis("Description: Self-Exploring Language Models: iterative preference optimisation of language models on MPI ranks")
help([[
Programs: selm_import selm_gen selm_rank selm_logp selm_train selm_iter selm_inspect (each has --help and --version).
  SELM_ROOT                       the installation
  $SELM_ROOT/share/selm/jobs      batch scripts
  $SELM_ROOT/share/selm/slurm     chains of jobs, sites
  $SELM_ROOT/share/selm/configs   recipes
  $SELM_ROOT/share/doc/selm       documentation; start with RUNNING.md
]])

family("selm")
if #needs > 0 then
    depends_on(unpack and unpack(needs) or table.unpack(needs))
end
setenv("SELM_ROOT", root)
prepend_path("PATH", pathJoin(root, "bin"))
prepend_path("CMAKE_PREFIX_PATH", root)
-- Only where a site has put shared libraries into the prefix: the programs carry their search path themselves.
for _, name in ipairs({ "lib", "lib64" }) do
    if isDir(pathJoin(root, name)) then
        prepend_path("LD_LIBRARY_PATH", pathJoin(root, name))
    end
end
