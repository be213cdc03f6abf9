// Candidates for the nearest centroid, as a library that knows neither torch nor Python: pointers, sizes, a stream, a
// status.
//
// Compile: plain C++17. Link with kmeans_assign.cu (nvcc -c -O3 -std=c++17 csrc/kmeans_assign.cu).
// What is computed, and in what memory, is in kmeans_assign.cuh; how operands and error coefficients are made, and why
// the lists prove which centroid is the nearest, in kernels/kmeans_assign/bound.py.
#pragma once

#include "status.h"

namespace mapet {

constexpr int ASSIGN_ROWS = 128;      // rows of a tile
constexpr int ASSIGN_CLUSTERS = 128;  // centroids of a tile: K is padded to it
constexpr int ASSIGN_FEATURES = 32;   // features of a step: D is padded to it, with zeros
constexpr int ASSIGN_LISTS = 4;       // lists of a row in each share of the centroids

// Entries of a list: the lowest three lower bounds of the exact mode, or the lowest score.
constexpr int assign_slots(bool exact) { return exact ? 3 : 1; }

struct AssignSizes {
  int groups;              // G problems at once
  long long rows;          // n of each group
  int clusters, features;  // K and D, both padded
  int shares;              // S: each block takes one share of the tiles of centroids
};

// Matrix (G n, D) in half precision, rows `stride` elements apart; a factor for each and, for the exact mode, a radius.
struct AssignRows {
  const void* values = nullptr;
  long long stride = 0;
  const float *scale = nullptr, *radius = nullptr;
};

// Matrix (G K, D) in half precision, rows one after the other; bias infinite for padding; slope and slack of the bound.
struct AssignCentroids {
  const void* values = nullptr;
  const float *bias = nullptr, *slope = nullptr, *slack = nullptr;
};

// Results, all rows of one list and slot together: (S * ASSIGN_LISTS, slots, G n), and for the exact mode reach
// (S * ASSIGN_LISTS, G n). Ids count within a group; -1 in a slot that nothing was put in.
struct AssignLists {
  float* bounds = nullptr;
  int* ids = nullptr;
  float* reach = nullptr;
};

// architecture: 70, 75, 80, ...; from 80 on copies into shared memory are asynchronous.
Status assign_scores(
    const AssignSizes& sizes, const AssignRows& rows, const AssignCentroids& centroids, bool exact,
    const AssignLists& lists, int architecture, void* stream);

}  // namespace mapet
