// What the parts of the null GPU share: counters of work, and reports of waits and allocations.
#pragma once
#include <cstddef>

#define NULLGPU_API extern "C" __attribute__((visibility("default")))

// Kinds of reports; watch.py has the same numbers.
enum Kind { SYNC = 1, TO_GPU_PAGEABLE = 2, TO_GPU_PINNED = 3, TO_HOST_PAGEABLE = 4, TO_HOST_PINNED = 5, MALLOC = 6, PIN = 7, WRONG_DEVICE = 8 };

// Counts a kernel that a library would have started.
void count_kernel(const char* name);

// A handle of any library: memory that nobody reads.
void* new_handle();
