#include <algorithm>
#include <charconv>
#include <chrono>

#include "io/json_fields.h"
#include "replay/recording_readers.h"

namespace triaxial {
namespace {

constexpr int64_t kMaxMilliseconds = int64_t{1} << 53;  // what JSON numbers hold exactly

RecordedSession SingleRequest(std::string id, double arrival, int64_t prompt, int64_t output) {
  RecordedRequest request;
  request.arrival = arrival;
  request.prompt_tokens = static_cast<int32_t>(prompt);
  request.output_tokens = static_cast<int32_t>(std::max<int64_t>(1, output));
  RecordedSession session;
  session.id = std::move(id);
  session.steps.push_back(std::move(request));
  return session;
}

// Sorts by arrival and lets the first request arrive at 0.
Result<std::vector<RecordedSession>> Sorted(std::vector<RecordedSession> sessions, const std::string& path) {
  if (sessions.empty()) return InvalidArgument(path + " holds no request");
  const auto arrival = [](const RecordedSession& s) { return s.steps[0].arrival; };
  std::stable_sort(sessions.begin(), sessions.end(),
                   [&](const auto& a, const auto& b) { return arrival(a) < arrival(b); });
  const double first = arrival(sessions.front());
  if (arrival(sessions.back()) - first > static_cast<double>(kMaxRecordedSeconds)) {
    return InvalidArgument(path +
                           ": its requests lie more than a year apart; are the timestamps what they "
                           "should be (milliseconds in Mooncake's traces)?");
  }
  for (RecordedSession& s : sessions) s.steps[0].arrival -= first;
  return sessions;
}

Result<std::vector<int64_t>> HashIds(const Json& json, const std::string& what) {
  std::vector<int64_t> ids;
  const auto found = json.find("hash_ids");
  if (found == json.end()) return ids;
  const std::string expected = ": hash_ids must be a list of integers from 0 to 2^40";
  if (!found->is_array()) return InvalidArgument(what + expected);
  ids.reserve(found->size());
  for (const Json& id : *found) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kMaxHashId) {
      return InvalidArgument(what + expected);
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

// Reads an unsigned number of `digits` digits (0: as many as there are) and the separator behind it.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}
  bool Number(int digits, int64_t* out) {
    const size_t limit = digits > 0 ? static_cast<size_t>(digits) : text_.size();
    const std::string_view part = text_.substr(0, limit);
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), *out);
    const auto taken = static_cast<size_t>(end - part.data());
    if (error != std::errc() || *out < 0 || text_[0] == '-' || (digits > 0 && taken != limit)) return false;
    text_.remove_prefix(taken);
    return true;
  }
  bool Skip(char c) {
    if (text_.empty() || text_[0] != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  // The digits behind a decimal point, as a fraction.
  double Fraction() {
    double value = 0, unit = 0.1;
    for (; !text_.empty() && text_[0] >= '0' && text_[0] <= '9'; text_.remove_prefix(1), unit /= 10) {
      value += unit * (text_[0] - '0');
    }
    return value;
  }
  void SkipUtcOffset() {
    if (text_.starts_with("+00:00")) text_.remove_prefix(6);
  }
  bool done() const { return text_.empty(); }

 private:
  std::string_view text_;
};

// "2023-11-16 18:15:46.6805900", also with +00:00, to seconds since 1970.
bool ParseTime(Cursor* at, double* seconds) {
  int64_t year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0;
  const bool read = at->Number(4, &year) && at->Skip('-') && at->Number(2, &month) && at->Skip('-') &&
                    at->Number(2, &day) && at->Skip(' ') && at->Number(2, &hour) && at->Skip(':') &&
                    at->Number(2, &minute) && at->Skip(':') && at->Number(2, &second);
  if (!read || hour > 23 || minute > 59 || second > 60) return false;
  const std::chrono::year_month_day date{std::chrono::year(static_cast<int>(year)),
                                         std::chrono::month(static_cast<unsigned>(month)),
                                         std::chrono::day(static_cast<unsigned>(day))};
  if (!date.ok()) return false;
  const int64_t days = std::chrono::sys_days(date).time_since_epoch().count();
  *seconds = static_cast<double>(((days * 24 + hour) * 60 + minute) * 60 + second);
  if (at->Skip('.')) *seconds += at->Fraction();
  at->SkipUtcOffset();
  return true;
}

}  // namespace

Result<std::vector<RecordedSession>> ReadMooncake(std::string_view text, const std::string& path) {
  std::vector<RecordedSession> sessions;
  RETURN_IF_ERROR(ForEachLine(text, path, [&](std::string_view line, const std::string& what) -> Status {
    ASSIGN_OR_RETURN(const Json json, ParseJson(line, what));
    if (!json.is_object()) return InvalidArgument(what + " is no JSON object; expected a request of a trace");
    const JsonFields fields(json, what);
    double milliseconds = 0;
    int64_t prompt = 0, output = 0;
    RETURN_IF_ERROR(fields.Number("timestamp", 0, static_cast<double>(kMaxMilliseconds), &milliseconds));
    RETURN_IF_ERROR(fields.Int("input_length", 1, kMaxRecordedTokens, &prompt));
    RETURN_IF_ERROR(fields.Int("output_length", 0, kMaxRecordedTokens, &output));
    sessions.push_back(SingleRequest(what, milliseconds / 1000, prompt, output));
    ASSIGN_OR_RETURN(sessions.back().steps[0].blocks, HashIds(json, what));
    return OkStatus();
  }));
  return Sorted(std::move(sessions), path);
}

Result<std::vector<RecordedSession>> ReadAzure(std::string_view text, const std::string& path) {
  std::vector<RecordedSession> sessions;
  bool header = true;
  RETURN_IF_ERROR(ForEachLine(text, path, [&](std::string_view line, const std::string& what) -> Status {
    if (std::exchange(header, false)) return OkStatus();
    Cursor at(line);
    double seconds = 0;
    int64_t prompt = 0, output = 0;
    const bool read = ParseTime(&at, &seconds) && at.Skip(',') && at.Number(0, &prompt) && at.Skip(',') &&
                      at.Number(0, &output) && at.done();
    if (!read || prompt < 1 || prompt > kMaxRecordedTokens || output > kMaxRecordedTokens) {
      return InvalidArgument(what +
                             " is not 'YYYY-MM-DD HH:MM:SS.fraction,prompt tokens,answer tokens' with "
                             "1 to 16777216 tokens of prompt and at most as many of answer");
    }
    sessions.push_back(SingleRequest(what, seconds, prompt, output));
    return OkStatus();
  }));
  return Sorted(std::move(sessions), path);
}

}  // namespace triaxial
