// Registers the plugin as soon as the library is opened, for hosts that open a library and do no more: polygraphy
// --plugins, ONNX Runtime's trt_extra_plugin_lib_paths, Triton, trtexec --staticPlugins.
//
// libdeploynorm_trt.so cannot do that itself: a host that loads a plugin library through TensorRT's registry does not
// take one that has registered by then. Here no header of TensorRT is used, so that one binary serves every release.

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "../contract.h"
#include "host.h"

namespace deploynorm {
namespace {

constexpr const char* kPlugin = "libdeploynorm_trt.so";
constexpr const char* kVersionText = "1";
static_assert(kVersion == 1, "the string is the contract's version");
constexpr const char* kOtherWay =
    "Fix: instead of this library load libdeploynorm_trt.so, through TensorRT's plugin registry "
    "(load_library in Python, trtexec --dynamicPlugins)";

using Paths = char[kHostCount][PATH_MAX];

// dl_iterate_phdr's callback, which may not open a library itself: notes where each host's file lies.
int note_path(dl_phdr_info* info, size_t, void* data) {
  Paths& paths = *static_cast<Paths*>(data);
  for (int host = 0; host < kHostCount; ++host) {
    const bool same = is_file_of(kHosts[host], base_name(info->dlpi_name));
    if (same && strlen(info->dlpi_name) < PATH_MAX) strcpy(paths[host], info->dlpi_name);
  }
  return 0;
}

using GetCreators = void* const*(int32_t& count);

// The plugin library, which lies beside this one and stays open; null, with a message, where it does not.
GetCreators* open_plugin() {
  Dl_info here;
  static const char anchor = 0;
  char path[PATH_MAX];
  const char* file = dladdr(&anchor, &here) == 0 ? "" : here.dli_fname;
  const int folder = static_cast<int>(base_name(file) - file);
  const bool fits = snprintf(path, sizeof path, "%.*s%s", folder, file, kPlugin) < PATH_MAX;
  void* library = dlopen(fits ? path : kPlugin, RTLD_NOW | RTLD_LOCAL);
  GetCreators* get_creators = library == nullptr ? nullptr : find<GetCreators>(library, "getCreators");
  if (get_creators == nullptr) {
    fprintf(stderr,
            "deploynorm: the plugin was not registered: %s. Fix: leave %s and this library in one folder, or build "
            "both again: deploynorm plugins build --cuda\n",
            dlerror(), kPlugin);
  }
  return get_creators;
}

void register_with(const Host& host, const char* path, GetCreators* get_creators) {
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return;  // it was closed meanwhile
  auto* get_registry = find<void*()>(library, "getPluginRegistry");
  const Version version = version_of(library);
  const Slots* slots = slots_of(host, version);
  void* registry = slots == nullptr || get_registry == nullptr ? nullptr : get_registry();
  if (registry == nullptr) {
    fprintf(stderr, "deploynorm: the plugin was not registered: this library does not know %s %d.%d (%s). %s\n",
            host.name, version.major, version.minor, path, kOtherWay);
    return;
  }
  using GetCreator = void*(void* registry, const char* name, const char* version, const char* name_space);
  using RegisterCreator = bool(void* registry, void* creator, const char* name_space);
  auto* register_creator = method<RegisterCreator>(registry, slots->register_creator);
  auto* get_creator = method<GetCreator>(registry, slots->get_creator);
  int32_t count = 0;
  void* const* creators = get_creators(count);
  for (int32_t index = 0; index < count; ++index) {
    if (register_creator(registry, creators[index], kDomain)) continue;
    // Asked only now, as TensorRT logs an error for a name that it does not find. One that is there serves as well.
    if (get_creator(registry, kOperators[index], kVersionText, kDomain) != nullptr) continue;
    fprintf(stderr, "deploynorm: %s %d.%d refused the plugin. %s\n", host.name, version.major, version.minor,
            kOtherWay);
  }
}

__attribute__((constructor)) void register_plugin() {
  static Paths paths;
  dl_iterate_phdr(note_path, paths);
  bool any = false;
  for (const char* path : paths) any = any || path[0] != '\0';
  if (!any) {
    fprintf(stderr,
            "deploynorm: the plugin was not registered: no TensorRT is loaded. Fix: open this library after TensorRT, "
            "or have TensorRT load libdeploynorm_trt.so itself (load_library in Python, trtexec --dynamicPlugins)\n");
    return;
  }
  GetCreators* get_creators = open_plugin();
  for (int host = 0; get_creators != nullptr && host < kHostCount; ++host) {
    if (paths[host][0] != '\0') register_with(kHosts[host], paths[host], get_creators);
  }
}

}  // namespace
}  // namespace deploynorm
