/* libnccl.so.2 beside fake_cuda.c: sums 32-bit integers in the host's memory when a group ends. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST 16

static int size, num_added;
static uint32_t *buffers[MOST];
static size_t num_elements;

static int has(const char *fault) {
    const char *faults = getenv("FAKE_CUDA_FAULTS");
    return faults && strstr(faults, fault);
}

const char *ncclGetErrorString(int code) { return "unhandled system error"; }
const char *ncclGetLastError(void *communicator) { return "no space in /dev/shm"; }

int ncclGetVersion(int *version) {
    *version = 22705;
    return 0;
}

int ncclCommInitAll(void **communicators, int count, const int *devices) {
    if (has("sum-fails-from-3") && count > 2) return 2;
    size = count;
    for (int i = 0; i < count; i++) communicators[i] = (void *)(intptr_t)(devices[i] + 1);
    return 0;
}

int ncclGroupStart(void) {
    num_added = 0;
    return 0;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *communicator, void *stream) {
    buffers[num_added++] = to;
    num_elements = count;
    return from == to && type == 3 && operation == 0 && (intptr_t)communicator == num_added ? 0 : 4;
}

int ncclGroupEnd(void) {
    if (has("sum-hangs")) pause();
    for (size_t i = 0; i < num_elements; i++) {
        uint32_t sum = 0;
        for (int rank = 0; rank < num_added; rank++) sum += buffers[rank][i];
        for (int rank = 0; rank < num_added; rank++) buffers[rank][i] = sum;
    }
    if (has("sum-wrong")) buffers[1][0] ^= 1;
    return num_added == size ? 0 : 5;
}

int ncclCommDestroy(void *communicator) { return 0; }
