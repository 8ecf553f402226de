// Every public method of @upstash/redis through the gateway.
import assert from "node:assert/strict"
import { after, before, test } from "node:test"
import { client, matches, readonlyToken, token, url } from "./support.mjs"
import { functionSteps, steps } from "./steps.mjs"

const needs74 = "expiry of hash fields needs Redis 7.4"
const needs8 = "needs Redis 8"
const needsModule = "needs a module that plain Redis does not have"
const hosted = "talks to another service of the hosted provider, not to Redis"
const cannotWork = {
  ...Object.fromEntries("hexpire hexpireat hexpiretime httl hpexpire hpexpireat hpexpiretime hpttl hpersist".split(" ").map((n) => [n, needs74])),
  ...Object.fromEntries("hgetdel hgetex hsetex xackdel xdelex".split(" ").map((n) => [n, needs8])),
  ...Object.fromEntries(
    "arcount ardel ardelrange arget argetrange argrep arinfo arinsert arlastitems arlen armget armset arnext arop arring arscan arseek arset"
      .split(" ").map((n) => [n, "the array type needs a newer Redis"])),
  json: needsModule,
  search: needsModule,
  vector: hosted,
}
// Tested by themselves below, or no commands: settings and machinery of the client.
const special = new Set(("bitfield functions pipeline multi autoPipeline createScript subscribe psubscribe use addTelemetry"
  + " opts client enableTelemetry enableAutoPipelining autoPipelineExecutor readYourWritesSyncToken").split(" "))

const redis = client()
before(() => redis.flushall())
after(() => redis.flushall())

test("every method alone", async () => {
  for (const { method, args, gives } of steps) matches(await redis[method](...args), gives, `${method} ${JSON.stringify(args)}`)
})

test("every method without base64", async () => {
  const plain = client({ responseEncoding: false })
  for (const { method, args, gives } of steps) matches(await plain[method](...args), gives, `${method} ${JSON.stringify(args)}`)
})

for (const kind of ["pipeline", "multi"])
  test(`every method in a ${kind}`, async () => {
    const batch = redis[kind]()
    const used = steps.filter(({ method }) => method !== "exec") // on a batch it sends the batch
    for (const { method, args } of used) batch[method](...args)
    const results = await batch.exec()
    used.forEach(({ method, args, gives }, index) => matches(results[index], gives, `${method} ${JSON.stringify(args)}`))
  })

test("every method by auto-pipelining", async () => {
  const auto = client({ enableAutoPipelining: true })
  // Those that would overtake or wipe out the others, or that the client sends by themselves.
  const alone = new Set(["flushdb", "flushall", "exec"])
  // The client sends reads and writes as two pipelines at once: these two would meet their group too early.
  const late = new Set(["xpending", "xinfo"])
  const used = steps.filter(({ method }) => !alone.has(method) && !late.has(method))
  const results = await Promise.all(used.map(({ method, args }) => auto[method](...args)))
  assert.equal(results.length, used.length)
  const rest = await Promise.all(steps.filter(({ method }) => late.has(method)).map(({ method, args }) => auto[method](...args)))
  assert.equal(rest.length, late.size)
  await auto.del("auto")
  const counts = await Promise.all(Array.from({ length: 50 }, () => auto.incr("auto")))
  assert.deepEqual(counts, Array.from({ length: 50 }, (_, index) => index + 1))
})

test("functions", async () => {
  for (const { method, args, gives } of functionSteps) matches(await redis.functions[method](...args), gives, `functions.${method}`)
  assert.deepEqual(Object.keys(client({ enableAutoPipelining: false }).functions).sort(), functionSteps.map(({ method }) => method).sort())
})

test("bitfields", async () => {
  assert.deepEqual(await redis.bitfield("bf").set("u8", 0, 200).incrby("u8", 0, 50).get("u8", 0).exec(), [0, 250, 250])
  assert.deepEqual(await redis.bitfield("bf").overflow("SAT").incrby("u8", 0, 50).exec(), [255])
})

test("scripts fall back from EVALSHA to EVAL", async () => {
  await redis.scriptFlush()
  const script = redis.createScript("return ARGV[1]")
  assert.equal(await script.exec([], ["one"]), "one")
  assert.equal(await script.evalsha([], ["two"]), "two")
  assert.equal(await script.eval([], ["three"]), "three")
  const reader = redis.createScript("return redis.call('get', KEYS[1])", { readonly: true })
  await redis.set("ro", "v")
  assert.equal(await reader.exec(["ro"], []), "v")
  assert.equal(await reader.evalshaRo(["ro"], []), "v")
  assert.equal(await reader.evalRo(["ro"], []), "v")
})

test("values keep their bytes", async () => {
  const text = Array.from({ length: 0xd7ff }, (_, index) => String.fromCharCode(index)).join("") + "😀"
  await redis.set("bytes", text)
  assert.equal(await client({ automaticDeserialization: false }).get("bytes"), text)
  const large = "x".repeat(3_000_000)
  await redis.set("large", large)
  assert.equal(await redis.get("large"), large)
  await redis.set("object", { list: [1, "2", null, { deep: true }] })
  assert.deepEqual(await redis.get("object"), { list: [1, "2", null, { deep: true }] })
})

test("errors are Redis's own", async () => {
  await redis.set("string", "x")
  await assert.rejects(redis.lpush("string", 1), /WRONGTYPE/)
  await assert.rejects(redis.evalsha("f".repeat(40), [], []), /NOSCRIPT/)
  await assert.rejects(client({ token: "wrong" }).get("x"), /WRONGPASS|Unauthorized/)
  const results = await redis.pipeline().set("a", 1).lpush("string", 1).get("a").exec({ keepErrors: true })
  assert.equal(results[0].result, "OK")
  assert.match(results[1].error, /WRONGTYPE/)
  assert.equal(results[2].result, 1)
})

test("read-only tokens", async () => {
  const reader = client({ token: readonlyToken })
  await redis.set("shown", "yes")
  assert.equal(await reader.get("shown"), "yes")
  await assert.rejects(reader.set("shown", "no"), /NOPERM/)
})

test("reads see one's own writes", async () => {
  await redis.set("own", 1)
  assert.ok(redis.readYourWritesSyncToken)
  assert.equal(await redis.get("own"), 1)
})

test("raw RESP2", async () => {
  await redis.set("resp", "OK")
  const response = await fetch(`${url}/get/resp`, { headers: { Authorization: `Bearer ${token}`, "Upstash-Response-Format": "resp2" } })
  assert.equal(await response.text(), "$2\r\nOK\r\n")
})

for (const [kind, pattern, event] of [["subscribe", "news", "message"], ["psubscribe", "ne*", "pmessage"]])
  test(`${kind} hears what is published`, async () => {
    const subscriber = redis[kind](pattern)
    await new Promise((resolve, reject) => {
      subscriber.on(kind, resolve)
      subscriber.on("error", reject)
    })
    const heard = new Promise((resolve) => subscriber.on(event, resolve))
    assert.equal(await redis.publish("news", { hello: "wörld" }), 1)
    const message = await heard
    assert.equal(message.channel, "news")
    assert.deepEqual(message.message, { hello: "wörld" })
    await subscriber.unsubscribe()
  })

test("what cannot work is refused by Redis, by name", async () => {
  for (const name of Object.keys(cannotWork)) {
    const commands = { json: "JSON.GET", search: "FT.SEARCH", vector: null }
    const command = name in commands ? commands[name] : name.toUpperCase()
    if (command) await assert.rejects(redis.exec([command, "key", "FIELDS", "1", "f"]), /unknown command/, name)
  }
})

test("no method is forgotten", () => {
  const names = new Set()
  for (let object = redis; object !== Object.prototype; object = Object.getPrototypeOf(object))
    for (const name of Object.getOwnPropertyNames(object)) names.add(name)
  names.delete("constructor")
  const tested = new Set(steps.map(({ method }) => method))
  const forgotten = [...names].filter((name) => !tested.has(name) && !special.has(name) && !(name in cannotWork))
  assert.deepEqual(forgotten, [])
  assert.deepEqual(Object.keys(cannotWork).filter((name) => tested.has(name) || !names.has(name)), [])
})
