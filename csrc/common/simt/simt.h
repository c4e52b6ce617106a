// The host SIMT emulator: CUDA kernels, compiled by a C++ compiler, run on the CPU, so that machines without a GPU test
// them. A launch runs block by block (cluster by cluster, or the whole grid of a cooperative launch at once); each
// thread is a fiber of one operating system thread, and runs until it waits for others. So a run is deterministic.
//
//   names.h       CUDA's types, qualifiers and arithmetic
//   scheduler.h   blocks, warps, threads; barriers; what one warp does together; errors
//   warp.h        shuffles, votes, __syncthreads and its like
//   memory.h      shared memory, cp.async, atomics
//   matrix.h      ldmatrix, mma
//   launch.h      launch(), the limits of a device, options
//   fiber.h       stacks and the switch between them
//   race.h        which access came after which, in the flavour compiled with -fsanitize=thread
//
// What it reports, as an exception out of launch(): a launch beyond the device's limits; barriers that not all threads
// reach, or reach in different places; warp functions whose lanes disagree; a deadlock; a misaligned or misdirected
// wide access; shared memory written past its end; and data races, in that flavour. In a third flavour AddressSanitizer
// sees accesses out of bounds, to global and to shared memory. What is uninitialised, not yet copied or of a block that
// has ended is full of 0xff bytes, which are NaN in every float type.
//
// Blocks and threads run in ascending, descending or random order (`set_option("order", …)`): what is right must not
// depend on it. What it cannot see: missing fences, bank conflicts, occupancy, how exactly tensor cores round, and
// blocks that spin until another block does something.
#pragma once

#include "launch.h"
#include "matrix.h"
#include "memory.h"
#include "names.h"
#include "warp.h"
