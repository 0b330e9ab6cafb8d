// Where rows are short, mixture_positions and mixture_backward are these.
#pragma once
#include "mixture_short.h"

namespace di4c::cpu::DI4C_ISA {

void short_positions(const MixtureArgs&, int threads);
void short_backward(const MixtureBackwardArgs&, int threads);

}  // namespace di4c::cpu::DI4C_ISA
