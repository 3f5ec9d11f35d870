"""What the page says, in English and Chinese; the browser's language decides."""

from __future__ import annotations

ENGLISH = {
    "title": "Chat",
    "message": "Message",
    "placeholder": "Write a message (Shift+Enter sends it)",
    "send": "Send",
    "stop": "Stop",
    "regenerate": "Regenerate",
    "roll_back": "Roll back",
    "clear": "Clear",
    "settings": "Settings",
    "model": "Model",
    "reload": "Reload the list",
    "key": "API key",
    "key_info": "Only if the server asks for one. It is not stored.",
    "system": "System prompt",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k (0: all)",
    "repetition_penalty": "Repetition penalty",
    "max_tokens": "Longest answer in tokens (0: as the server says)",
}
CHINESE = {
    "title": "对话",
    "message": "消息",
    "placeholder": "输入消息（Shift+Enter 发送）",
    "send": "发送",
    "stop": "停止",
    "regenerate": "重新生成",
    "roll_back": "撤回",
    "clear": "清空",
    "settings": "设置",
    "model": "模型",
    "reload": "刷新列表",
    "key": "API 密钥",
    "key_info": "仅在服务器要求时填写，不会保存。",
    "system": "系统提示",
    "temperature": "温度",
    "top_p": "Top-p",
    "top_k": "Top-k（0：全部）",
    "repetition_penalty": "重复惩罚",
    "max_tokens": "最长回答（token 数，0：由服务器决定）",
}
# Over what a model thought; it is made here too.
THOUGHT = "Thought 思考"
# What the line under the conversation says; it is made here and not in the browser, so each has both languages.
STATUS = {
    "unreachable": "The server does not answer. 服务器没有响应。",
    "wrong_key": "The server asks for another API key (Settings). 服务器需要正确的 API 密钥（设置）。",
    "busy": "The server is busy: try again. 服务器繁忙，请重试。",
    "failed": "There is no answer. 没有得到回答。",
    "broken_off": "The answer broke off. 回答中断了。",
    "too_long": "The message is too long: at most 100,000 characters. 消息过长，最多 100,000 个字符。",
    "empty": "",
}


def status(word: str, detail: str = "") -> str:
    """A line for the page, with what the API said."""
    return f"{STATUS[word]} {detail}".strip()
