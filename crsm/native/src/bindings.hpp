// What module.cpp binds, one function per concept.
#pragma once

#include <nanobind/nanobind.h>

namespace crsm {

void bind_decode(nanobind::module_& m);
void bind_exact(nanobind::module_& m);
void bind_injection(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_latent(nanobind::module_& m);
void bind_memory_read(nanobind::module_& m);
void bind_mixer(nanobind::module_& m);
void bind_scan(nanobind::module_& m);
void bind_search(nanobind::module_& m);
void bind_slots(nanobind::module_& m);
void bind_watch(nanobind::module_& m);

}  // namespace crsm
