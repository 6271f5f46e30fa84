// The CPU kernels of a library for another processor, for tests/foreign.py, which runs this under an emulator and
// talks to it through pipes. First it writes the names of the variants in a line. A request is a Head, a field for each
// pointer of the call and for the workspace (which buffer it points to, or -1), and the buffers: a size, how far from
// an alignment of 64 bytes it begins, and its bytes. The answer is the code, and all buffers; or, for the size of the
// workspace, that size.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "frn.h"

namespace {

enum What : int32_t { kForward, kBackward, kWorkspace };

struct Head {
  int64_t sizes[4];
  int32_t what, type, fields, buffers;
  char variant[16];  // empty for the library's choice
};

struct Field {
  int64_t buffer, offset;
};

void read(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(feof(stdin) ? 0 : 1);
}

// The structs end with their pointers, in the order in which these come; the last of those is the workspace.
template <typename Call>
Call call_of(const Head& head, const std::vector<void*>& pointers) {
  Call call = {};
  call.samples = head.sizes[0];
  call.channels = head.sizes[1];
  call.spatial = head.sizes[2];
  call.channel_block = head.sizes[3];
  call.type = head.type;
  const size_t bytes = (pointers.size() - 1) * sizeof(void*);
  if (sizeof call != 4 * sizeof(int64_t) + sizeof(int64_t) + bytes) exit(2);
  memcpy(reinterpret_cast<char*>(&call) + sizeof call - bytes, pointers.data(), bytes);
  return call;
}

void answer(const Head& head) {
  std::vector<Field> fields(head.fields);
  read(fields.data(), fields.size() * sizeof(Field));
  std::vector<int64_t> sizes(head.buffers);
  std::vector<char*> buffers, memory;
  for (int64_t& size : sizes) {
    int64_t off = 0;
    read(&size, sizeof size);
    read(&off, sizeof off);
    memory.push_back(static_cast<char*>(aligned_alloc(64, (size + off + 127) / 64 * 64)));
    buffers.push_back(memory.back() + off);
    read(buffers.back(), size);
  }
  std::vector<void*> pointers;
  for (const Field& field : fields) {
    pointers.push_back(field.buffer < 0 ? nullptr : buffers[field.buffer] + field.offset);
  }
  const char* variant = head.variant[0] == '\0' ? nullptr : head.variant;
  if (head.what == kWorkspace) {
    const auto call = call_of<deploynorm_frn_backward>(head, pointers);
    const int64_t bytes = deploynorm_frn_backward_cpu_workspace(&call);
    fwrite(&bytes, sizeof bytes, 1, stdout);
  } else {
    int32_t code;
    if (head.what == kForward) {
      const auto call = call_of<deploynorm_frn>(head, pointers);
      code = deploynorm_frn_cpu(&call, nullptr, nullptr, variant);
    } else {
      const auto call = call_of<deploynorm_frn_backward>(head, pointers);
      code = deploynorm_frn_backward_cpu(&call, pointers.back(), nullptr, nullptr, variant);
    }
    fwrite(&code, sizeof code, 1, stdout);
    for (size_t i = 0; i < buffers.size(); ++i) fwrite(buffers[i], 1, sizes[i], stdout);
  }
  fflush(stdout);
  for (char* each : memory) free(each);
}

}  // namespace

int main() {
  for (const char* const* name = deploynorm_cpu_variants(); *name != nullptr; ++name) printf("%s ", *name);
  printf("\n");
  fflush(stdout);
  for (;;) {
    Head head;
    read(&head, sizeof head);
    answer(head);
  }
}
