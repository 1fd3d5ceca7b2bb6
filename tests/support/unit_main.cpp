#include <gtest/gtest.h>

#ifdef SELM_TEST_WITH_KOKKOS
#include <Kokkos_Core.hpp>
#endif

int main(int argc, char** argv)
{
    ::testing::InitGoogleTest(&argc, argv);
#ifdef SELM_TEST_WITH_KOKKOS
    Kokkos::ScopeGuard kokkos(argc, argv);
#endif
    return RUN_ALL_TESTS();
}
