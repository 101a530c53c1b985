-- Requests of 1,000 accounts in turn, and the result as one line of JSON.
local path = os.getenv('BENCH_PATH')
local requests, at = {}, 0

function init()
  for number = 0, 999 do
    local account = string.format('account-%07d', number * 31 % 1000)
    requests[number + 1] = wrk.format('POST', path, {['X-Account'] = account})
  end
end

function request()
  at = at % 1000 + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"per_second": %.1f, "p50_us": %.1f, "p99_us": %.1f, "failed": %d}\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
