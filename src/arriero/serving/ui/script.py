"""What the page does in the browser itself, beside Gradio's own scripts."""

from __future__ import annotations

import re

# A text is shown as it is, in code and out of it: what would begin a tag or an entity stands as a noncharacter of Unicode on
# its way through Gradio's Markdown, and `SCRIPT` puts the sign itself back into the finished page, as text. An address in
# angle brackets is left to Markdown, which makes a link of it.
_SIGNS = {"<": "\ufdd0", "&": "\ufdd1"}
_LITERAL = "\ufdd2"  # before a noncharacter that was in the text itself
_TO_SHOW = r"<(?!https?:\/\/[^\s<>]*>)(?=[A-Za-z\/!?])|&(?=#?[A-Za-z0-9]+;)|[\ufdd0-\ufdd2]"
_SHOWN = r"\ufdd2([\ufdd0-\ufdd2])|[\ufdd0\ufdd1]"
_PLAIN = {shown: sign for sign, shown in _SIGNS.items()}


def show(text: str) -> str:
    """A text for Gradio's Markdown in which no HTML is seen."""
    return re.sub(_TO_SHOW, lambda found: _SIGNS.get(found[0]) or _LITERAL + found[0], text)


def plain(text: str) -> str:
    """The text that `show` was given."""
    return re.sub(_SHOWN, lambda found: found[1] or _PLAIN[found[0]], text)


# One action at a time works on the conversation: it begins (which ends an answer under way, in the server), takes hold when
# the one before has let go, and lets go. Gradio's own `cancels` waits for nothing: late pieces come over the next turn.
_TEMPLATE = r"""<script>
window.arriero = (() => {
  const SIGNS = {"<": "\ufdd0", "&": "\ufdd1"}, PLAIN = {"\ufdd0": "<", "\ufdd1": "&"}, HIDDEN = /[\ufdd0-\ufdd2]/;
  const show = text => text.replace(/TO_SHOW/g, found => SIGNS[found] || "\ufdd2" + found);
  const plain = text => text.replace(/SHOWN/g, (found, literal) => literal || PLAIN[found]);

  const reveal = root => {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = root.nodeType === Node.TEXT_NODE ? root : walker.nextNode(); node; node = walker.nextNode())
      if (HIDDEN.test(node.data)) node.data = plain(node.data);
  };
  const observer = new MutationObserver(records => {
    for (const record of records) {
      if (record.type === "characterData") reveal(record.target);
      record.addedNodes.forEach(reveal);
    }
    observer.takeRecords();
  });
  observer.observe(document.documentElement, {subtree: true, childList: true, characterData: true});
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(plain(text));
  }
  document.addEventListener("copy", event => {  // without https Gradio copies out of a field that it makes
    const text = event.target.value;
    if (typeof text !== "string" || !HIDDEN.test(text)) return;
    event.clipboardData.setData("text/plain", plain(text));
    event.preventDefault();
  });

  // Gradio knows zh-CN and zh-TW, and takes English for every other Chinese.
  const language = navigator.language || "";
  if (/^zh/i.test(language))
    Object.defineProperty(navigator, "language", {value: /hant|tw|hk|mo/i.test(language) ? "zh-TW" : "zh-CN"});

  let waiting = 0, held = false, asks = false;
  const isUser = turn => turn !== undefined && turn.role === "user";
  const textOf = ({content}) => plain(typeof content === "string" ? content : content.map(part => part.text || "").join(""));
  const joined = (...texts) => texts.filter(text => text.trim()).join("\n\n");

  const STORE = "arriero-page";
  let kept = null, loaded = false, timer = 0;
  const write = () => {
    try { if (kept) localStorage.setItem(STORE, JSON.stringify(kept)); } catch { /* full, or not allowed */ }
  };
  const stored = () => {
    try { return JSON.parse(localStorage.getItem(STORE)) || {}; } catch { return {}; }
  };
  window.addEventListener("pagehide", write);

  return {
    begin: () => { waiting++; return []; },
    leave: () => { waiting--; return []; },
    hold: async () => {
      while (held) await new Promise(resolve => setTimeout(resolve, 20));
      held = true;
      waiting--;
      return [];
    },
    letGo: () => { held = false; return []; },
    take: (history, text) => {
      const turns = [...(history || [])];
      asks = text.trim() !== "" || isUser(turns.at(-1));
      if (!asks) return [turns, text];
      if (isUser(turns.at(-1))) text = joined(textOf(turns.pop()), text);
      turns.push({role: "user", content: [{type: "text", text: show(text)}], metadata: null, options: null});
      return [turns, ""];
    },
    takeAgain: () => { asks = true; return []; },
    ask: (history, ...others) => [asks && waiting === 0 ? history : null, ...others],
    back: (history, draft) => {
      const turns = [...(history || [])];
      while (turns.length && !isUser(turns.at(-1))) turns.pop();
      return turns.length ? [turns, joined(textOf(turns.pop()), draft)] : [turns, draft];
    },
    giveBack: (history, draft) => {  // a message to which nothing came
      const turns = history || [];
      if (waiting || !isUser(turns.at(-1))) return [undefined, undefined];
      return [turns.slice(0, -1), joined(textOf(turns.at(-1)), draft)];
    },
    fold: () => {
      const open = document.querySelector("#folded").classList.toggle("open");
      document.querySelector("#settings button").setAttribute("aria-expanded", open);
      return [];
    },
    load: count => {
      document.querySelector("#status").setAttribute("aria-live", "polite");
      document.querySelector("#settings button").setAttribute("aria-expanded", false);
      loaded = true;
      const values = stored().values;
      return Array.isArray(values) && values.length === count ? values : Array(count).fill(undefined);
    },
    model: (key, chosen) => [key, chosen || stored().model || null],
    keep: (model, ...values) => {
      if (!loaded) return [];
      kept = {model: model || stored().model, values};
      clearTimeout(timer);
      timer = setTimeout(write, 300);
      return [];
    },
  };
})();
</script>"""
SCRIPT = _TEMPLATE.replace("TO_SHOW", _TO_SHOW).replace("SHOWN", _SHOWN)
