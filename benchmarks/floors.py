"""What a method costs at least: its multiplications over the frozen layer's."""


def floor(formula: str, out: int, inp: int, tokens: int, r: int, k: int) -> float:
    """Forward + backward of an adapted Linear over those of the frozen one, counted in multiplications of matrix products.

    The frozen layer makes two products of n x in x out multiplications for n tokens: y and dx. Over these 2 n in out,

    * bone makes three more of n x r x out (s D, dy D^T, s^T dy): 1 + 1.5 r / in.
    * mini with D (r, r) makes them of n x r x r: 1 + 1.5 r^2 / (in out).
    * bat-row and bat-free make in/r times two of n x r x r (dx, dB) and one more for z, or of out x r x r for W B where
      that is less: 1 + (1 + min(1, out / n) / 2) r / out. `exact` makes one more of n x in x out: 0.5 more.
    * bat-left makes out/r times three of n x r x r (u B, dy B^T, dB): 1 + 1.5 r / in.
    * bat makes one more of n x in x out (dW' = dy^T x) and three of r x in x out (W B twice, as W' is not kept, and dB):
      1.5 + 1.5 r / n. `exact` multiplies x with W' - W on its own, one more of n x in x out: 2 + 1.5 r / n.
    * lora of rank k makes three of n x k x (in + out): 1 + 1.5 k (in + out) / (in out).

    Sums and other passes over memory do not count. Products of other shapes may run somewhat faster or slower for the same
    number of multiplications, so a measured ratio can lie a little below its floor.
    """
    match formula:
        case "frozen":
            return 1.0
        case "lora":
            return 1 + 1.5 * k * (inp + out) / (inp * out)
        case "bone" | "bat-left":
            return 1 + 1.5 * r / inp
        case "mini":
            return 1 + 1.5 * r * r / (inp * out)
        case "bat-row" | "bat-free":
            return 1 + (1 + min(1, out / tokens) / 2) * r / out
        case "bat-row exact":
            return 1.5 + (1 + min(1, out / tokens) / 2) * r / out
        case "bat":
            return 1.5 + 1.5 * r / tokens
        case "bat exact":
            return 2 + 1.5 * r / tokens
    raise ValueError(f"No floor is known for {formula!r}.")
