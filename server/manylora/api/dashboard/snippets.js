// A request of the page as a command and as a program. The key stays out of both: they take it from MANYLORA_KEY.

const address = (path) => new URL(path, document.baseURI).toString();
const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** For a shell. `needsKey`: whether the server asks for one. */
export function asCurl(path, body, needsKey) {
  const key = needsKey ? '\n  -H "authorization: Bearer $MANYLORA_KEY" \\' : "";
  const stream = body.stream ? " -N" : "";
  return `curl -s${stream} ${quoted(address(path))} \\${key}\n  -H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}\n`;
}

/** For Python, with OpenAI's client. */
export function asPython(path, body) {
  const isChat = path.endsWith("chat/completions");
  const { stream_options: _, ...told } = body;
  const client = `client = OpenAI(base_url=${literal(address("v1"))}, api_key=os.environ.get("MANYLORA_KEY", "none"))`;
  if (!body.stream) {
    const route = literal(path.replace(/^v1/, ""));
    return ["import os\n", "from openai import OpenAI\n", client, `print(client.post(${route}, cast_to=object, body=${literal(body)}))\n`].join("\n");
  }
  const fields = Object.entries(told).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const piece = isChat ? 'event.choices[0].delta.content or ""' : "event.choices[0].text";
  return [
    "import os\n",
    "from openai import OpenAI\n",
    client,
    `for event in client.${isChat ? "chat.completions" : "completions"}.create(\n${fields}):`,
    `    print(${piece}, end="", flush=True)`,
    "print()\n",
  ].join("\n");
}

/** A value of JSON as Python writes it. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}
