/* libcuda.so.1 without a device: memory is the host's, and FAKE_CUDA_FAULTS names what is wrong, by commas.
   "Device" 0 to FAKE_CUDA_DEVICES - 1; a context is the number of its device + 1. */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OUT_OF_MEMORY 2
#define NO_DEVICE 100
#define SYSTEM_NOT_READY 802
#define ALREADY_ENABLED 704
#define NOT_ENABLED 705
#define GIB ((size_t)1 << 30)
#define MOST 16

static __thread intptr_t current;
static int enabled[MOST + 1][MOST + 1];
static int busy[MOST + 1];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int has(const char *fault) {
    const char *faults = getenv("FAKE_CUDA_FAULTS");
    const char *found = faults ? strstr(faults, fault) : NULL;
    return found && (found == faults || found[-1] == ',') && strchr(",", found[strlen(fault)]);
}

static int about(const char *format, int first, int second) {
    char fault[64];
    snprintf(fault, sizeof fault, format, first, second);
    return has(fault);
}

static void hang(void) {
    for (;;) pause();
}

static int num_devices(void) {
    const char *number = getenv("FAKE_CUDA_DEVICES");
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = number ? atoi(number) : 0;
    if (visible && !*visible) return 0;
    if (!visible) return count;
    count = 1;
    for (; *visible; visible++) count += *visible == ',';
    return count;
}

int cuInit(unsigned flags) {
    if (has("init-slow")) sleep(3);
    if (has("init-hangs")) hang();
    if (has("init-fails")) return SYSTEM_NOT_READY;
    return num_devices() ? 0 : NO_DEVICE;
}

int cuGetErrorName(int code, const char **text) {
    *text = code == SYSTEM_NOT_READY ? "CUDA_ERROR_SYSTEM_NOT_READY"
            : code == OUT_OF_MEMORY  ? "CUDA_ERROR_OUT_OF_MEMORY"
                                     : "CUDA_ERROR_OF_THIS_FAKE";
    return 0;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == SYSTEM_NOT_READY ? "system not yet initialized" : "something is wrong";
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = num_devices();
    return 0;
}

int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Fake GPU");
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : 0;
    return 0;
}

int cuDeviceGetP2PAttribute(int *value, int attribute, int first, int second) {
    *value = 0;
    return 0;
}

int cuDeviceCanAccessPeer(int *value, int first, int second) {
    *value = 1;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (about("open-hangs:%d", device, 0)) hang();
    if (about("open-crashes:%d", device, 0)) raise(SIGKILL);
    if (about("open-fails:%d", device, 0)) return OUT_OF_MEMORY;
    if (has("open-slow")) sleep(1);
    *context = (void *)(intptr_t)(device + 1);
    return 0;
}

int cuCtxSetCurrent(void *context) {
    current = (intptr_t)context;
    return 0;
}

int cuCtxSynchronize(void) { return current ? 0 : 201; }

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = (about("small:%d", (int)current - 1, 0) ? 24 : 80) * GIB;
    *free = about("half-taken:%d", (int)current - 1, 0) ? *total / 2 : *total - GIB / 2;
    return current ? 0 : 201;
}

int cuMemAlloc_v2(uint64_t *address, size_t size) {
    *address = (uint64_t)(uintptr_t)malloc(size);
    return current ? 0 : 201;
}

int cuMemFree_v2(uint64_t address) {
    free((void *)(uintptr_t)address);
    return 0;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) {
    memcpy((void *)(uintptr_t)to, from, size);
    return 0;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) {
    memcpy(to, (void *)(uintptr_t)from, size);
    return 0;
}

int cuCtxEnablePeerAccess(void *context, unsigned flags) {
    int *is_enabled = &enabled[current][(intptr_t)context];
    if (*is_enabled) return ALREADY_ENABLED;
    *is_enabled = 1;
    return 0;
}

/* Two copies at the same time that share a device are an error, and so is one without access. */
static int occupy(int from, int to) {
    pthread_mutex_lock(&lock);
    int is_free = !busy[from] && !busy[to];
    busy[from] = busy[to] = 1;
    pthread_mutex_unlock(&lock);
    return is_free && enabled[from][to] && current == from ? 0 : NOT_ENABLED;
}

int cuMemcpyPeer(uint64_t to, void *to_context, uint64_t from, void *from_context, size_t size) {
    int target = (int)(intptr_t)to_context, source = (int)(intptr_t)from_context;
    int failed = occupy(source, target);
    if (failed) return failed;
    if (about("copy-hangs:%d-%d", source - 1, target - 1)) hang();
    usleep(10000);
    memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, size);
    if (about("copy-wrong:%d-%d", source - 1, target - 1)) ((char *)(uintptr_t)to)[size / 2] ^= 1;
    pthread_mutex_lock(&lock);
    busy[source] = busy[target] = 0;
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuModuleLoadData(void **module, const void *image) {
    if (has("no-compiler")) return 221;
    *module = (void *)image;
    return strstr(image, ".entry affine(") ? 0 : 218;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "affine") ? 500 : 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    uint32_t *out = *(uint32_t **)parameters[0], factor = *(uint32_t *)parameters[1];
    if (about("kernel-hangs:%d", (int)current - 1, 0)) hang();
    for (uint32_t i = 0; i < gx * bx; i++) out[i] = i * factor + 7;
    if (about("kernel-wrong:%d", (int)current - 1, 0)) out[gx * bx / 2] ^= 1;
    return 0;
}
