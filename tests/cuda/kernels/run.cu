// The library's one function: for ctypes.
#include "cases.h"

namespace imagen_fast {

std::map<std::string, void (*)()>& cases() {
  static std::map<std::string, void (*)()> all;
  return all;
}

}  // namespace imagen_fast

// Run a case with options of the emulator ("order=reverse seed=1"); returns "" or what went wrong, until the next call.
extern "C" __attribute__((visibility("default"))) const char* run_case(const char* name, const char* options) {
  static std::string message;
  message.clear();
  try {
    std::string words(options);
    for (size_t begin = 0, end; begin < words.size(); begin = end + 1) {
      end = std::min(words.find(' ', begin), words.size());
      const size_t equals = words.find('=', begin);
      imagen_fast::simt::set_option(words.substr(begin, equals - begin), words.substr(equals + 1, end - equals - 1));
    }
    imagen_fast::cases().at(name)();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// The names of all cases, each on a line
extern "C" __attribute__((visibility("default"))) const char* case_names() {
  static std::string names;
  names.clear();
  for (const auto& [name, run] : imagen_fast::cases()) names += name + "\n";
  return names.c_str();
}
