"""Conversations of a shop's assistant that calls functions, drawn at random: every result is what the function gives.

A `Shop` holds the facts and the functions. A `Request` is what a customer wants, and the call that answers it.
"""

import json
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple

ITEMS = {"notebook": 4, "lamp": 25, "backpack": 48, "mug": 9, "umbrella": 17, "clock": 32, "blanket": 29, "kettle": 38}
CITIES = ("Lyon", "Porto", "Graz", "Bergen", "Turin", "Ghent")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
STYLES = ("tools", "xml_tools", "python_tools")
POLICY = (
    "You are the assistant of a shop for household goods. Help customers with their orders, with prices, with delivery "
    "and with opening hours. Use the functions for every fact: never guess a price, a date or the state of an order. "
    "Ask for the order number where it is missing. Call one function at a time, and answer in one or two sentences. "
    "All prices are in euros."
)


def _function(name: str, description: str, required: int, **parameters: dict) -> dict:
    """A JSON schema; the first `required` parameters have to be given."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)[:required]}
    return {"name": name, "description": description, "parameters": schema}


_ORDER = {"type": "string", "description": "Number of the order, such as A1234."}
FUNCTIONS = {
    function["name"]: function
    for function in (
        _function("find_order", "Item, quantity and state of an order.", 1, order_id=_ORDER),
        _function(
            "change_quantity", "Changes how many pieces an order has.", 2, order_id=_ORDER, quantity={"type": "integer"}
        ),
        _function(
            "total_price", "Price of several items together.", 1,
            items={"type": "array", "items": {"type": "string", "enum": list(ITEMS)}},
            gift_wrap={"type": "boolean", "description": "Adds 3 euros. The default is false."},
        ),
        _function(
            "delivery_cost", "Cost of a parcel.", 2,
            weight={"type": "number", "description": "Kilograms."}, express={"type": "boolean"},
        ),
        _function(
            "opening_hours", "When a shop is open.", 2,
            city={"type": "string", "enum": list(CITIES)}, day={"type": "string", "enum": list(DAYS)},
        ),
    )
}  # fmt: skip


class Request(NamedTuple):
    """What a customer wants.

    Attributes:
        ask: The question with all that the call needs.
        begin: The question without its number, what the assistant then asks back, and the customer's answer.
        name, arguments: The call that answers it.
        slip: Arguments of a call that does not.
        reply: From the function's result to the assistant's answer.
    """

    ask: str
    begin: tuple[str, str, str] | None
    name: str
    arguments: dict[str, Any]
    slip: dict[str, Any]
    reply: Callable[[dict], str]


class Shop:
    """Orders and opening hours of one conversation; the methods named in FUNCTIONS are its functions."""

    def __init__(self, draw: Random):
        numbers = draw.sample(range(1000, 10_000), 4)
        self.orders = {
            f"{draw.choice('ABCDE')}{number}": {
                "item": draw.choice(list(ITEMS)),
                "quantity": draw.randint(1, 6),
                "state": draw.choice(("packed", "sent", "waiting for stock")),
            }
            for number in numbers
        }
        self.opens = {(city, day): draw.randint(8, 10) for city in CITIES for day in DAYS}

    def find_order(self, order_id: str) -> dict:
        order = self.orders.get(order_id)
        return {"order_id": order_id, **order} if order else {"error": f"there is no order {order_id}"}

    def change_quantity(self, order_id: str, quantity: int) -> dict:
        order = self.orders.get(order_id)
        if order is None:
            return {"error": f"there is no order {order_id}"}
        return {"order_id": order_id, "quantity": quantity, "total": quantity * ITEMS[order["item"]]}

    def total_price(self, items: list[str], gift_wrap: bool = False) -> dict:
        return {"total": sum(ITEMS[item] for item in items) + 3 * gift_wrap}

    def delivery_cost(self, weight: float, express: bool) -> dict:
        return {"cost": round(4 + 1.5 * weight + 6 * express, 2)}

    def opening_hours(self, city: str, day: str) -> dict:
        return {"city": city, "day": day, "opens": self.opens[city, day], "closes": 18}

    def call(self, name: str, arguments: dict[str, Any]) -> dict:
        """The function's result."""
        return getattr(self, name)(**arguments)


# ---------------------------------------------------------------- rows


def conversation_row(draw: Random, style: str) -> dict:
    """A conversation of two or three requests.

    Args:
        style: How calls are written, one of STYLES. tools: the column `tools` and structured `tool_calls`, as OpenAI
            writes them. xml_tools, python_tools: SmolTalk2's template variables, with `<tool_call>` or `<code>` in the
            replies.
    """
    shop = Shop(draw)
    turns = [turn for request in _requests(draw, shop) for turn in _turns(draw, shop, request, style)]
    row = {"messages": [*turns, {"role": "user", "content": "Thank you, that is all."}, _GOODBYE]}
    return _in_style(row, style)


def pair_row(draw: Random) -> dict:
    """The same requests answered twice, with structured calls: the rejected side takes wrong arguments in the last."""
    shop = Shop(draw)
    *earlier, last = _requests(draw, shop)
    prompt = [turn for request in earlier for turn in _turns(draw, shop, request, "tools")]
    asked = draw.getstate()
    sides = {}
    for side, request in (("chosen", last), ("rejected", last._replace(arguments=last.slip))):
        draw.setstate(asked)  # both sides ask in the same words
        sides[side] = [*prompt, *_turns(draw, shop, request, "tools")]
    return _in_style(sides, "tools")


def call_question(draw: Random, number: int) -> tuple[dict, dict]:
    """A question that one call answers, and the accepted call, as Berkeley's function-calling leaderboard writes them.

    Args:
        number: Of the row; every other one offers all functions, the rest the one that is needed.
    """
    request = draw.choice(_REQUESTS)(draw, Shop(draw))
    several = number % 2 == 1
    offered = [FUNCTIONS[name] for name in (FUNCTIONS if several else [request.name])]
    row_id = f"{'multiple' if several else 'simple'}_{number}"
    parameters = FUNCTIONS[request.name]["parameters"]["properties"]
    accepted = {name: [request.arguments[name]] if name in request.arguments else ["", False] for name in parameters}
    question = {
        "id": row_id,
        "question": [[{"role": "user", "content": request.ask}]],
        "function": [{**f, "parameters": {**f["parameters"], "type": "dict"}} for f in offered],
    }
    return question, {"id": row_id, "ground_truth": [{request.name: accepted}]}


_GOODBYE = {"role": "assistant", "content": "You are welcome. Have a nice day!"}


def _turns(draw: Random, shop: Shop, request: Request, style: str) -> Iterable[dict]:
    """The messages of one request: the question, the call, its result, the answer."""
    if request.begin and draw.random() < 0.5:
        first, back, second = request.begin
        yield {"role": "user", "content": first}
        yield {"role": "assistant", "content": back}
        yield {"role": "user", "content": second}
    else:
        yield {"role": "user", "content": request.ask}
    result, call_id = shop.call(request.name, request.arguments), f"call_{draw.randrange(16**8):08x}"
    answer = {"role": "tool", "name": request.name, "content": json.dumps(result)}
    if style == "tools":
        function = {"name": request.name, "arguments": json.dumps(request.arguments)}
        call = {"id": call_id, "type": "function", "function": function}
        yield {"role": "assistant", "content": None, "tool_calls": [call]}
        yield {**answer, "tool_call_id": call_id}
    else:
        yield {"role": "assistant", "content": _written(request, style)}
        yield answer
    reply = f"I am sorry, {result['error']}." if "error" in result else request.reply(result)
    yield {"role": "assistant", "content": reply}


def _written(request: Request, style: str) -> str:
    if style == "xml_tools":
        return f"<tool_call>{json.dumps({'name': request.name, 'arguments': request.arguments})}</tool_call>"
    arguments = ", ".join(f"{name}={value!r}" for name, value in request.arguments.items())
    return f"<code>{request.name}({arguments})</code>"


def _in_style(sides: dict[str, list[dict]], style: str) -> dict:
    """A row of conversations with the policy and the functions where the style has them; no reply thinks."""
    if style == "tools":
        system = {"role": "system", "content": POLICY}
        row = {name: [system, *messages] for name, messages in sides.items()}
        tools = [{"type": "function", "function": function} for function in FUNCTIONS.values()]
        return row | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "source": style}
    kwargs = {"custom_instructions": POLICY, "enable_thinking": False, "python_tools": [], "xml_tools": []}
    return sides | {
        "chat_template_kwargs": kwargs | {style: [json.dumps(f) for f in FUNCTIONS.values()]},
        "source": style,
    }


# ---------------------------------------------------------------- requests


def _requests(draw: Random, shop: Shop) -> list[Request]:
    return [make(draw, shop) for make in draw.sample(_REQUESTS, draw.randint(2, 3))]


def _find(draw: Random, shop: Shop) -> Request:
    order, other = draw.sample(list(shop.orders), 2)
    return Request(
        f"What is the state of my order {order}?",
        ("Where is my order?", "Which number does the order have?", f"It is {order}."),
        "find_order",
        {"order_id": order},
        {"order_id": other},
        lambda found: f"Your order of {found['quantity']} x {found['item']} is {found['state']}.",
    )


def _change(draw: Random, shop: Shop) -> Request:
    order, quantity = draw.choice(list(shop.orders)), draw.randint(7, 12)
    return Request(
        f"Please change order {order} to {quantity} pieces.",
        (f"I need {quantity} pieces instead.", "Which order is that?", f"Order {order}."),
        "change_quantity",
        {"order_id": order, "quantity": quantity},
        {"order_id": f"Z{order[1:]}", "quantity": quantity},
        lambda found: f"Order {found['order_id']} now has {found['quantity']} pieces and costs {found['total']} euros.",
    )


def _price(draw: Random, shop: Shop) -> Request:
    items = draw.sample(list(ITEMS), draw.randint(2, 4))
    return Request(
        f"How much do these cost together: {', '.join(items)}?",
        None,
        "total_price",
        {"items": items},
        {"items": items[:-1]},
        lambda found: f"Together they cost {found['total']} euros.",
    )


def _delivery(draw: Random, shop: Shop) -> Request:
    weight, express = draw.randint(2, 40) / 2, draw.random() < 0.5
    return Request(
        f"What does {'express' if express else 'normal'} delivery of a parcel of {weight} kg cost?",
        None,
        "delivery_cost",
        {"weight": weight, "express": express},
        {"weight": weight, "express": not express},
        lambda found: f"The delivery costs {found['cost']:.2f} euros.",
    )


def _hours(draw: Random, shop: Shop) -> Request:
    city, (day, other) = draw.choice(CITIES), draw.sample(DAYS, 2)
    return Request(
        f"When is your shop in {city} open on {day}?",
        (f"When are you open on {day}?", "In which city?", f"In {city}."),
        "opening_hours",
        {"city": city, "day": day},
        {"city": city, "day": other},
        lambda found: f"On {found['day']} it is open from {found['opens']} to {found['closes']} o'clock.",
    )


_REQUESTS = (_find, _change, _price, _delivery, _hours)
