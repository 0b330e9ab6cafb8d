// Kernels that are wrong on purpose, to show that the emulator would see the mistake, beside two that are right.
#pragma once
#include <string>

// Runs the kernel of that name on an array of 64 ints; false if there is none.
bool run_broken(const std::string& name, int* values);
