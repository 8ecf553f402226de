// @upstash/ratelimit through the gateway: every algorithm, every public method.
import assert from "node:assert/strict"
import { test } from "node:test"
import { Ratelimit } from "@upstash/ratelimit"
import { client } from "./support.mjs"

const redis = client()
const algorithms = {
  fixedWindow: Ratelimit.fixedWindow(3, "30 s"),
  slidingWindow: Ratelimit.slidingWindow(3, "30 s"),
  tokenBucket: Ratelimit.tokenBucket(1, "30 s", 3),
  cachedFixedWindow: Ratelimit.cachedFixedWindow(3, "30 s"),
}

for (const [name, limiter] of Object.entries(algorithms))
  test(`${name} refuses the fourth request`, async () => {
    const prefix = `rl-${name}-${Math.random()}`
    const ratelimit = new Ratelimit({ redis, limiter, prefix, ephemeralCache: new Map(), analytics: false })
    const answers = []
    for (let count = 0; count < 4; count++) {
      const answer = await ratelimit.limit("user")
      await answer.pending
      answers.push(answer.success)
    }
    assert.deepEqual(answers, [true, true, true, false])
    assert.equal((await ratelimit.limit("other")).success, true)
    if (name !== "cachedFixedWindow") {
      assert.equal((await ratelimit.getRemaining("user")).remaining, 0)
      assert.equal((await ratelimit.blockUntilReady("user", 50)).success, false)
      await ratelimit.resetUsedTokens("user")
      const fresh = new Ratelimit({ redis, limiter, prefix, ephemeralCache: false })
      assert.equal((await fresh.limit("user", { rate: 1 })).success, true)
    }
  })

test("dynamic limits are kept in Redis", async () => {
  const ratelimit = new Ratelimit({
    redis, limiter: Ratelimit.slidingWindow(2, "30 s"), prefix: `rl-dynamic-${Math.random()}`, ephemeralCache: false, dynamicLimits: true,
  })
  await ratelimit.setDynamicLimit({ limit: 5 })
  assert.equal((await ratelimit.getDynamicLimit()).dynamicLimit, 5)
  const answers = []
  for (let count = 0; count < 6; count++) answers.push((await ratelimit.limit("user")).success)
  assert.deepEqual(answers, [true, true, true, true, true, false])
})

test("analytics are written", async () => {
  const ratelimit = new Ratelimit({ redis, limiter: Ratelimit.fixedWindow(3, "30 s"), prefix: `rl-analytics-${Math.random()}`, analytics: true })
  const answer = await ratelimit.limit("user")
  await answer.pending
  assert.equal(answer.success, true)
})

test("no method is forgotten", () => {
  const ratelimit = new Ratelimit({ redis, limiter: Ratelimit.fixedWindow(3, "30 s") })
  const methods = Object.keys(ratelimit).filter((name) => typeof ratelimit[name] === "function")
  const tested = "limit blockUntilReady resetUsedTokens getRemaining setDynamicLimit getDynamicLimit".split(" ")
  assert.deepEqual(methods.filter((name) => !tested.includes(name) && !["limiter", "primaryRedis"].includes(name)), [
    "getRatelimitResponse", "applyTimeout", "submitAnalytics", "getKey", "getDefinedMembers",
  ])
})
