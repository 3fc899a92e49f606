// The operations of `SumTree`, see there. All points descend one level before any descends the next, so that their
// memory reads overlap. The child is counted without branches, since it is unpredictable; that a point is before the end
// of its node is nearly always true, so that one branch is cheap.

struct Call {
  double *nodes; const long long *starts; long long levels, size;
  long long *rows; double *values; long long count;
};

extern "C" void find(const Call *call) {
  long long *node = call->rows, count = call->count;
  double *rest = call->values;
  for (long long k = 0; k < count; k++) node[k] = 0;
  for (long long i = 1; i < call->levels; i++) {
    const double *level = call->nodes + call->starts[i];
    for (long long k = 0; k < count; k++) {
      const double *children = level + 8 * node[k];
      double ends[9] = {0.0};
      for (int j = 0; j < 8; j++) ends[j + 1] = ends[j] + children[j];
      int child = 0;
      double point = rest[k];
      if (point < ends[8])
        for (int j = 1; j < 8; j++) child += ends[j] <= point;
      else
        for (int j = 1; j < 8; j++) child += ends[j] < ends[8];
      rest[k] -= ends[child];
      node[k] = 8 * node[k] + child;
    }
  }
  const double *leaves = call->nodes + call->starts[call->levels - 1];
  for (long long k = 0; k < count; k++) rest[k] = leaves[node[k]];
}

static long long write(const Call *call, bool also_zeros) {
  long long *node = call->rows, count = call->count;
  double *leaves = call->nodes + call->starts[call->levels - 1];
  for (long long k = 0; k < count; k++)
    if (node[k] < 0 || node[k] >= call->size) return 1;
  for (long long k = 0; k < count; k++)
    if (also_zeros || leaves[node[k]] > 0) leaves[node[k]] = call->values[k];
  for (long long i = call->levels - 1; i > 0; i--) {
    const double *level = call->nodes + call->starts[i];
    double *above = call->nodes + call->starts[i - 1];
    for (long long k = 0; k < count; k++) {
      node[k] >>= 3;
      const double *children = level + 8 * node[k];
      double sum = children[0];
      for (int j = 1; j < 8; j++) sum += children[j];
      above[node[k]] = sum;
    }
  }
  return 0;
}

extern "C" long long fill(const Call *call) { return write(call, true); }
extern "C" long long change(const Call *call) { return write(call, false); }
