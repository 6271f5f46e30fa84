// The TensorRT that a library of ours is in: which one, and where its interfaces have their methods, which changed with
// TensorRT 11. No header of TensorRT is used, so that one binary serves every release.

#ifndef DEPLOYNORM_TENSORRT_HOST_H_
#define DEPLOYNORM_TENSORRT_HOST_H_

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

namespace deploynorm {

// A TensorRT as its file is named.
struct Host {
  const char* file;  // how its name begins
  const char* name;
  bool rtx;
};
constexpr Host kHosts[] = {
    {"libnvinfer.so", "TensorRT", false},
    {"libnvinfer_lean.so", "TensorRT's lean runtime", false},
    {"libnvinfer_dispatch.so", "TensorRT's dispatch runtime", false},
    {"libtensorrt_rtx.so", "TensorRT-RTX", true},
};
constexpr int kHostCount = sizeof kHosts / sizeof kHosts[0];

// Where the methods of its registry and its logger are in their virtual tables. What is called by a wrong slot ends the
// process.
struct Slots {
  int register_creator;
  int get_creator;
  int log;
};
constexpr Slots kSlots10 = {12, 14, 0};
constexpr Slots kSlots11 = {8, 10, 4};

struct Version {
  int32_t major, minor;
};

// Of what getInferLibVersion() returns, which had one digit less for the minor version before TensorRT 10.
inline Version version_of(int32_t number) {
  if (number < 10000) return {number / 1000, number / 100 % 10};
  return {number / 10000, number / 100 % 100};
}

// TensorRT-RTX changed as TensorRT 11 did, within a major version; before 1.4 its interfaces are not known.
inline const Slots* slots_of(const Host& host, Version version) {
  if (host.rtx) return version.major != 1 || version.minor < 4 ? nullptr : version.minor == 4 ? &kSlots10 : &kSlots11;
  return version.major == 10 ? &kSlots10 : version.major == 11 ? &kSlots11 : nullptr;
}

inline const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

template <typename Function>
Function* find(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

template <typename Function>
Function* method(void* object, int slot) {
  return reinterpret_cast<Function*>((*static_cast<void***>(object))[slot]);
}

// Whether a file name is that of this TensorRT, with or without a version behind it.
inline bool is_file_of(const Host& host, const char* name) {
  const size_t length = strlen(host.file);
  return strncmp(name, host.file, length) == 0 && (name[length] == '\0' || name[length] == '.');
}

inline Version version_of(void* library) {
  auto* get_version = find<int32_t()>(library, "getInferLibVersion");
  return version_of(get_version == nullptr ? 0 : get_version());
}

// The TensorRT that has its code at this address, with the path of its file; null for other code.
inline const Host* host_at(const void* code, const char** path) {
  Dl_info library;
  if (code == nullptr || dladdr(code, &library) == 0 || library.dli_fname == nullptr) return nullptr;
  *path = library.dli_fname;
  for (const Host& host : kHosts) {
    if (is_file_of(host, base_name(*path))) return &host;
  }
  return nullptr;
}

// Logs an error with the TensorRT that has its code at this address; false where it has no logger, or is not known.
inline bool log_error(const void* code, const char* message) {
  const char* path = nullptr;
  const Host* host = host_at(code, &path);
  void* library = host == nullptr ? nullptr : dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return false;
  const Slots* slots = slots_of(*host, version_of(library));
  auto* get_logger = find<void*()>(library, "getLogger");
  void* logger = slots == nullptr || get_logger == nullptr ? nullptr : get_logger();
  constexpr int32_t kError = 1;
  if (logger != nullptr) {
    method<void(void* logger, int32_t severity, const char* message)>(logger, slots->log)(logger, kError, message);
  }
  dlclose(library);
  return logger != nullptr;
}

}  // namespace deploynorm

#endif  // DEPLOYNORM_TENSORRT_HOST_H_
