-- PUT of a 180-byte session, another one each time; tests.bench.record describes it.
local token = os.getenv("BENCH_TOKEN") or ""
local moment = os.date("!%Y-%m-%dT%H:%M:%S.000Z")
local tail = '","currentState":"choosing_size","lastActivity":"' .. moment
  .. '","pendingData":{"productType":"music","capacity":"64GB"},"buyingIntent":50}'
local headers = { ["Content-Type"] = "application/json" }
if token ~= "" then headers["Authorization"] = "Bearer " .. token end
local number = 0

function request()
  number = (number + 1) % 10000
  local id = "57" .. (3000000000 + number)
  return wrk.format("PUT", "/v1/sessions/" .. id, headers, '{"recipientPhone":"' .. id .. tail)
end

function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  print(string.format('{"answered":%d,"failed":%d,"seconds":%f}', summary.requests, failed, summary.duration / 1e6))
end
