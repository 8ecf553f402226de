// What the tests share: clients of the gateway under test, and matchers.
import assert from "node:assert/strict"
import { Redis } from "@upstash/redis"

export const url = process.env.GATEWAY_URL
export const token = process.env.GATEWAY_TOKEN
export const readonlyToken = process.env.GATEWAY_READONLY_TOKEN
if (!url || !token) throw new Error("GATEWAY_URL and GATEWAY_TOKEN are not set; run this through pytest")

export const client = (options = {}) => new Redis({ url, token, enableAutoPipelining: false, retry: false, ...options })

export class Match {
  constructor(text, test) {
    this.text = text
    this.test = test
  }
}
export const where = (test) => new Match(test.toString(), test)
export const unordered = (...items) =>
  new Match(`in any order ${JSON.stringify(items)}`, (value) =>
    Array.isArray(value) && JSON.stringify([...value].sort()) === JSON.stringify([...items].sort()))

export function matches(actual, expected, what) {
  if (expected instanceof Match) assert.ok(expected.test(actual), `${what}: ${JSON.stringify(actual)} is not ${expected.text}`)
  else assert.deepEqual(actual, expected, what)
}
