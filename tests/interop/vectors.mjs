// Makes tests/fixtures/mls/*.json with ts-mls, from random inputs, in the format of the test vectors of RFC 9420's working group:
//   node vectors.mjs crypto-basics > ../fixtures/mls/crypto-basics.json
//   node vectors.mjs key-schedule > ../fixtures/mls/key-schedule.json

import * as mls from "ts-mls"
import { expandWithLabel, deriveSecret, deriveTreeSecret } from "ts-mls/crypto/kdf.js"
import { refhash } from "ts-mls/crypto/hash.js"
import { encryptWithLabel } from "ts-mls/crypto/hpke.js"
import { signWithLabel } from "ts-mls/crypto/signature.js"
import { initializeEpoch } from "ts-mls/keySchedule.js"
import { encodeGroupContext } from "ts-mls/groupContext.js"
import { randomBytes } from "node:crypto"

const hex = (data) => Buffer.from(data).toString("hex")
const random = (length = 32) => new Uint8Array(randomBytes(length))

async function suites(make) {
  const all = []
  for (const number of [1, 2, 3]) {
    const name = Object.entries(mls.ciphersuites).find(([, id]) => id === number)[0]
    const suite = await mls.getCiphersuiteImpl(mls.getCiphersuiteFromName(name))
    all.push({ cipher_suite: number, ...(await make(suite, name)) })
  }
  return all
}

async function cryptoBasics(suite) {
  const [secret, context, value] = [random(), random(), random()]
  const pair = await suite.hpke.generateKeyPair()
  const sealed = await encryptWithLabel(pair.publicKey, "EncryptWithLabel", context, value, suite.hpke)
  const signer = await suite.signature.keygen()
  const signature = await signWithLabel(signer.signKey, "SignWithLabel", value, suite.signature)
  return {
    ref_hash: { label: "RefHash", value: hex(value), out: hex(await refhash("RefHash", value, suite.hash)) },
    expand_with_label: {
      secret: hex(secret), label: "ExpandWithLabel", context: hex(context), length: 16,
      out: hex(await expandWithLabel(secret, "ExpandWithLabel", context, 16, suite.kdf)),
    },
    derive_secret: { secret: hex(secret), label: "DeriveSecret", out: hex(await deriveSecret(secret, "DeriveSecret", suite.kdf)) },
    derive_tree_secret: {
      secret: hex(secret), label: "DeriveTreeSecret", generation: 2_694_881_440, length: 32,
      out: hex(await deriveTreeSecret(secret, "DeriveTreeSecret", 2_694_881_440, 32, suite.kdf)),
    },
    sign_with_label: { pub: hex(signer.publicKey), content: hex(value), label: "SignWithLabel", signature: hex(signature) },
    encrypt_with_label: {
      priv: hex(await suite.hpke.exportPrivateKey(pair.privateKey)), pub: hex(await suite.hpke.exportPublicKey(pair.publicKey)),
      label: "EncryptWithLabel", context: hex(context), plaintext: hex(value),
      kem_output: hex(sealed.enc), ciphertext: hex(sealed.ct),
    },
  }
}

async function keySchedule(suite, name) {
  const first = random()
  let init = first
  const epochs = []
  for (const epoch of [0n, 1n]) {
    const [commit, psk] = [random(), random()]
    const context = {
      version: "mls10", cipherSuite: name, groupId: random(16), epoch, treeHash: random(), confirmedTranscriptHash: random(), extensions: [],
    }
    const made = await initializeEpoch(init, commit, context, psk, suite.kdf)
    const keys = made.keySchedule
    const external = await suite.hpke.deriveKeyPair(keys.externalSecret)
    const exported = await mls.mlsExporter(keys.exporterSecret, "exporter label", random(0), 32, suite)
    epochs.push({
      commit_secret: hex(commit), psk_secret: hex(psk), group_context: hex(encodeGroupContext(context)),
      joiner_secret: hex(made.joinerSecret), welcome_secret: hex(made.welcomeSecret), encryption_secret: hex(made.encryptionSecret),
      init_secret: hex(keys.initSecret), sender_data_secret: hex(keys.senderDataSecret), exporter_secret: hex(keys.exporterSecret),
      epoch_authenticator: hex(keys.epochAuthenticator), external_secret: hex(keys.externalSecret), confirmation_key: hex(keys.confirmationKey),
      membership_key: hex(keys.membershipKey), resumption_psk: hex(keys.resumptionPsk),
      external_pub: hex(await suite.hpke.exportPublicKey(external.publicKey)),
      exporter: { label: "exporter label", context: "", length: 32, secret: hex(exported) },
    })
    init = keys.initSecret
  }
  return { initial_init_secret: hex(first), epochs }
}

const make = { "crypto-basics": cryptoBasics, "key-schedule": keySchedule }[process.argv[2]]
console.log(JSON.stringify(await suites(make), null, 1))
