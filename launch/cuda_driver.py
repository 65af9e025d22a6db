"""CUDA's driver by ctypes: what devices there are, and what can be tried of them without importing torch.

torch takes seconds to import, and the driver seconds more to initialise where there are many devices; who asks
the driver itself need not wait for one after the other. All calls but the first are for the thread that has
entered a context. Knows nothing of ranks.
"""

from __future__ import annotations

import ctypes
from itertools import permutations

LIBRARY = "libcuda.so.1"
# CUresult and CUdevice_attribute of cuda.h
_NO_DEVICE = 100
JIT_COMPILER_NOT_FOUND = 221
_PEER_ACCESS_ALREADY_ENABLED = 704
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
# CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_P2P_NATIVE_ATOMICS = 3
_NAME_BYTES = 256
_BLOCK = 256


class CudaError(RuntimeError):
    """A call of the driver failed: its name, and what the driver says of it.

    Attributes:
        code: the CUresult; 0 where the driver cannot be loaded.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class CudaDriver:
    """The driver, initialised in this process, which must not have been forked from one that has done so."""

    def __init__(self) -> None:
        """Initialise it: it sees what CUDA_VISIBLE_DEVICES lets it.

        Raises:
            CudaError: there is no driver, or it does not work.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CudaError(f"the library of the driver cannot be loaded: {error}") from error
        count = ctypes.c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGetCount", ctypes.byref(count))
        except CudaError as error:
            if error.code != _NO_DEVICE:
                raise
        self.num_devices = count.value

    def name(self, index: int) -> str:
        """Return what the device calls itself."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, index)
        return name.value.decode(errors="replace")

    def capability(self, index: int) -> tuple[int, int]:
        """Return the compute capability of the device, such as (9, 0)."""
        value = ctypes.c_int()
        found = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, index)
            found.append(value.value)
        return found[0], found[1]

    def reaches(self, source: int, target: int) -> bool:
        """Tell whether one device says that it can access the other's memory."""
        value = ctypes.c_int()
        self._call("cuDeviceCanAccessPeer", ctypes.byref(value), source, target)
        return bool(value.value)

    def open(self, index: int) -> ctypes.c_void_p:
        """Return the context of the device that this process's libraries share, entered by this thread."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
        self.enter(context)
        return context

    def enter(self, context: ctypes.c_void_p) -> None:
        """Make the calls of this thread that follow be for this context's device."""
        self._call("cuCtxSetCurrent", context)

    def memory(self) -> tuple[int, int]:
        """Return the free bytes and all bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def put(self, data: bytes) -> ctypes.c_uint64:
        """Return the address of new memory of the device that holds `data`."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(len(data)))
        self._call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        return address

    def take(self, address: ctypes.c_uint64, num_bytes: int) -> bytes:
        """Wait for the device, return what is in its memory there, and free it."""
        self._call("cuCtxSynchronize")
        data = ctypes.create_string_buffer(num_bytes)
        self._call("cuMemcpyDtoH_v2", data, address, ctypes.c_size_t(num_bytes))
        self.free(address)
        return data.raw

    def free(self, address: ctypes.c_uint64) -> None:
        """Give memory of the device back."""
        self._call("cuMemFree_v2", address)

    def reach(self, other: ctypes.c_void_p) -> None:
        """Let the device access the memory of another one's context."""
        try:
            self._call("cuCtxEnablePeerAccess", other, 0)
        except CudaError as error:
            if error.code != _PEER_ACCESS_ALREADY_ENABLED:
                raise

    def copy(
        self,
        target: tuple[ctypes.c_void_p, ctypes.c_uint64],
        source: tuple[ctypes.c_void_p, ctypes.c_uint64],
        num_bytes: int,
    ) -> None:
        """Copy from memory of one context to that of another, and wait for it; each is context and address."""
        (to, to_address), (from_, from_address) = target, source
        self._call("cuMemcpyPeer", to_address, to, from_address, from_, ctypes.c_size_t(num_bytes))
        self._call("cuCtxSynchronize")

    def run(self, ptx: bytes, name: bytes, num_threads: int, *arguments: ctypes.c_uint64) -> None:
        """Compile the kernel for the device and start it: a multiple of 256 threads, 64 bits an argument."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ptx)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name)
        parameters = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        grid, block = (num_threads // _BLOCK, 1, 1), (_BLOCK, 1, 1)
        self._call("cuLaunchKernel", function, *grid, *block, 0, None, parameters, None)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            said = [ctypes.c_char_p(), ctypes.c_char_p()]
            self._library.cuGetErrorName(code, ctypes.byref(said[0]))
            self._library.cuGetErrorString(code, ctypes.byref(said[1]))
            error, text = ((one.value or b"?").decode() for one in said)
            raise CudaError(f"{name.removesuffix('_v2')}: {error} ({text})", code)


def are_gpus_linked(num_gpus: int) -> bool:
    """Tell whether each of the first `num_gpus` GPUs of this process can do atomics on every other's memory.

    NVLink does them, PCIe does not. The driver is initialised already.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    value = ctypes.c_int()
    for pair in permutations(range(num_gpus), 2):
        failed = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _P2P_NATIVE_ATOMICS, *pair)
        if failed or not value.value:
            return False
    return True
