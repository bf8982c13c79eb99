#include "text/output_parser.h"

#include <deque>
#include <string_view>
#include <utility>

#include "text/stop_strings.h"
#include "text/tool_call_json.h"
#include "text/utf8.h"

namespace triaxial {
namespace {

constexpr std::string_view kNewlines = "\n", kSpaces = " \t\r\n";

}  // namespace

// Tokens become text with the places of the markers in it; stop strings hold the end of that text back; what
// they release runs through a state machine that deals it out to content, reasoning and calls.
struct OutputParser::Impl {
  Impl(const Tokenizer& tokenizer, OutputOptions given)
      : tokenizer(tokenizer),
        options(std::move(given)),
        markup(FindMarkup(tokenizer)),
        stops(options.stop),
        state(options.starts_in_thought ? State::kThought : State::kContent),
        trim(options.starts_in_thought && options.parse_reasoning ? Trim::kNewlines : Trim::kNothing) {}

  enum class State { kContent, kThought, kCall };
  enum class Trim { kNothing, kNewlines, kSpaces };
  struct Marker {
    size_t begin;  // in `waiting`
    size_t length;
    int32_t token;
  };

  void Push(int32_t token, OutputDelta* delta) {
    if (stopped) return;
    if (options.skip_special_tokens && tokenizer.IsSpecial(token)) return;
    const std::string_view bytes = tokenizer.TokenBytes(token);
    const std::string text = utf8.Push(bytes);
    if (markup.IsMarker(token)) {
      markers.push_back({waiting.size() + text.size() - bytes.size(), bytes.size(), token});
    }
    Queue(text, delta);
  }

  void Finish(OutputDelta* delta) {
    if (!stopped) Queue(utf8.Finish(), delta);
    Release(waiting.size(), delta);
    if (state == State::kCall) EndCall(/*closed=*/false, delta);
    // Whitespace at the end of content is content, but not what only stood behind a call.
    Emit(std::exchange(held_space, {}), delta);
  }

  // Text that is new -> text that no stop string can claim any more.
  void Queue(const std::string& text, OutputDelta* delta) {
    const size_t before = waiting.size();
    const StopStrings::Match match = stops.Push(text);
    waiting += text;
    if (!match.found) {
      Release(waiting.size() - stops.held(), delta);
      return;
    }
    waiting.resize(before + match.end - (options.include_stop ? 0 : match.length));
    while (!markers.empty() && markers.back().begin + markers.back().length > waiting.size()) {
      markers.pop_back();  // what the stop string left of it is text
    }
    stopped = true;
    Release(waiting.size(), delta);
    delta->stopped = true;
  }

  // Hands on the first `size` bytes of `waiting`, but no part of a marker.
  void Release(size_t size, OutputDelta* delta) {
    size_t at = 0;
    while (!markers.empty() && markers.front().begin < size) {
      const Marker marker = markers.front();
      if (marker.begin + marker.length > size) {
        size = marker.begin;
        break;
      }
      markers.pop_front();
      OnText(std::string_view(waiting).substr(at, marker.begin - at), delta);
      OnMarker(marker.token, delta);
      at = marker.begin + marker.length;
    }
    OnText(std::string_view(waiting).substr(at, size - at), delta);
    waiting.erase(0, size);
    for (Marker& marker : markers) marker.begin -= size;
  }

  void OnText(std::string_view text, OutputDelta* delta) {
    if (state == State::kCall) {
      call += text;
      return;
    }
    if (trim != Trim::kNothing) {
      const size_t begin = text.find_first_not_of(trim == Trim::kSpaces ? kSpaces : kNewlines);
      if (begin == std::string_view::npos) return;
      text.remove_prefix(begin);
      trim = Trim::kNothing;
    }
    // Whitespace may turn out to stand before a marker; then it is no part of the message.
    std::string_view may_vanish;
    if (state == State::kThought) {
      if (options.parse_reasoning) may_vanish = kNewlines;
    } else if (options.parse_reasoning || options.parse_tool_calls) {
      may_vanish = kSpaces;
    }
    const size_t end = text.find_last_not_of(may_vanish);
    if (end == std::string_view::npos) {
      held_space += text;
      return;
    }
    Emit(std::exchange(held_space, {}), delta);
    Emit(text.substr(0, end + 1), delta);
    held_space = text.substr(end + 1);
  }

  void OnMarker(int32_t token, OutputDelta* delta) {
    switch (state) {
      case State::kContent:
        if (token == markup.think_begin) {
          Switch(State::kThought, token, delta);
        } else if (token == markup.tool_call_begin && options.parse_tool_calls) {
          state = State::kCall;  // held_space waits: a call that is none gives it back
        } else {
          OnText(tokenizer.TokenBytes(token), delta);
        }
        return;
      case State::kThought:
        if (token == markup.think_end) {
          Switch(State::kContent, token, delta);
        } else {
          OnText(tokenizer.TokenBytes(token), delta);
        }
        return;
      case State::kCall:
        if (token == markup.tool_call_end) {
          EndCall(/*closed=*/true, delta);
        } else if (token == markup.tool_call_begin) {
          EndCall(/*closed=*/false, delta);
          state = State::kCall;
        } else {
          call += tokenizer.TokenBytes(token);
        }
        return;
    }
  }

  // Into or out of a thought, by `marker`.
  void Switch(State next, int32_t marker, OutputDelta* delta) {
    if (options.parse_reasoning) {
      held_space.clear();
      trim = Trim::kNewlines;
    } else {
      OnText(tokenizer.TokenBytes(marker), delta);
    }
    state = next;
  }

  // The text of a call is complete, if only because something else begins or the output ends.
  void EndCall(bool closed, OutputDelta* delta) {
    std::string text = std::exchange(call, {});
    state = State::kContent;
    if (std::optional<ToolCall> parsed = ParseToolCallJson(text)) {
      delta->tool_calls.push_back(std::move(*parsed));
      held_space.clear();
      trim = Trim::kSpaces;
      return;
    }
    trim = Trim::kNothing;
    Emit(std::exchange(held_space, {}), delta);
    Emit(tokenizer.TokenBytes(markup.tool_call_begin), delta);
    OnText(text, delta);
    if (closed) OnText(tokenizer.TokenBytes(markup.tool_call_end), delta);
  }

  void Emit(std::string_view text, OutputDelta* delta) {
    const bool reasoning = state == State::kThought && options.parse_reasoning;
    (reasoning ? delta->reasoning : delta->content) += text;
  }

  const Tokenizer& tokenizer;
  const OutputOptions options;
  const MarkupIds markup;
  Utf8Stream utf8;
  StopStrings stops;
  bool stopped = false;
  std::string waiting;         // text that a stop string may claim
  std::deque<Marker> markers;  // in `waiting`
  State state;
  Trim trim;               // what is dropped until something else comes
  std::string held_space;  // whitespace that counts only if something else follows
  std::string call;        // text after <tool_call>
};

OutputParser::OutputParser(const Tokenizer& tokenizer, OutputOptions options)
    : impl_(std::make_unique<Impl>(tokenizer, std::move(options))) {}
OutputParser::OutputParser(OutputParser&&) noexcept = default;
OutputParser::~OutputParser() = default;

OutputDelta OutputParser::Push(int32_t token) {
  OutputDelta delta;
  impl_->Push(token, &delta);
  return delta;
}

OutputDelta OutputParser::Finish() {
  OutputDelta delta;
  impl_->Finish(&delta);
  return delta;
}

}  // namespace triaxial
