// Which instruction sets were built and which one serves.
#pragma once
#include <string>
#include <vector>

namespace di4c::cpu {

std::vector<std::string> isas_built();

// The widest built set that this processor and its system support, or the one DI4C_ISA names, looked at on every
// call. Throws std::invalid_argument where DI4C_ISA names a set that is unknown, not built or not supported here.
std::string isa_active();

}  // namespace di4c::cpu
