// A member of MLS groups by ts-mls, an implementation that shares no code with ours. tests/mls_interop.rs tells it what to do, one JSON object a line, and
// reads one for each. Bytes are base64.

import * as mls from "ts-mls"
import { decodeRatchetTree, encodeRatchetTree, stripBlankNodes } from "ts-mls/ratchetTree.js"
import { createInterface } from "node:readline"

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"))
const text = (data) => Buffer.from(data).toString("base64")
const message = (data) => mls.decodeMlsMessage(bytes(data), 0)[0]
const encode = (wireformat, name, content) => text(mls.encodeMlsMessage({ version: "mls10", wireformat, [name]: content }))

let suite
let own
let state

const view = () => ({
  epoch: Number(state.groupContext.epoch),
  authenticator: text(state.keySchedule.epochAuthenticator),
  tree_hash: text(state.groupContext.treeHash),
})

const commit = async (extraProposals) => {
  const made = await mls.createCommit({ state, cipherSuite: suite }, { extraProposals, wireAsPublicMessage: true })
  state = made.newState
  return {
    commit: text(mls.encodeMlsMessage(made.commit)),
    welcome: made.welcome && encode("mls_welcome", "welcome", made.welcome),
    tree: text(encodeRatchetTree(stripBlankNodes(state.ratchetTree))),
    ...view(),
  }
}

const work = {
  async start({ suite: id, identity, extensions }) {
    const name = Object.entries(mls.ciphersuites).find(([, number]) => number === id)[0]
    suite = await mls.getCiphersuiteImpl(mls.getCiphersuiteFromName(name))
    const now = BigInt(Math.floor(Date.now() / 1000))
    const capabilities = { versions: ["mls10"], ciphersuites: [name], extensions, proposals: [], credentials: ["basic"] }
    const lifetime = { notBefore: now - 60n, notAfter: now + 60n * 86_400n }
    own = await mls.generateKeyPackage({ credentialType: "basic", identity: bytes(identity) }, capabilities, lifetime, [], suite)
    return { key_package: encode("mls_key_package", "keyPackage", own.publicPackage) }
  },
  async join({ welcome, tree }) {
    const decoded = message(welcome).welcome
    state = await mls.joinGroup(decoded, own.publicPackage, own.privatePackage, mls.emptyPskIndex, suite, decodeRatchetTree(bytes(tree), 0)[0])
    return view()
  },
  async update() {
    return commit([])
  },
  async add({ key_package }) {
    return commit([{ proposalType: "add", add: { keyPackage: message(key_package).keyPackage } }])
  },
  async write({ content }) {
    const made = await mls.createApplicationMessage(state, bytes(content), suite)
    state = made.newState
    return { message: encode("mls_private_message", "privateMessage", made.privateMessage) }
  },
  async receive({ message: data }) {
    const done = await mls.processMessage(message(data), state, mls.emptyPskIndex, mls.acceptAll, suite)
    state = done.newState
    return { content: done.kind === "applicationMessage" ? text(done.message) : null, ...view() }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const { op, ...rest } = JSON.parse(line)
  try {
    console.log(JSON.stringify({ ok: await work[op](rest) }))
  } catch (error) {
    console.log(JSON.stringify({ error: `${op}: ${error?.stack ?? error}` }))
  }
}
