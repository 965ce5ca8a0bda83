// Tables that stay as they are while their numbers change: what has the focus or is selected keeps it.

import { NONE, byId, element, say, scrolled } from "./dom.js";

/**
 * A table in the element `id`; what it returns shows rows. Each column has a `name` and a `value` of the row, by
 * which it is sorted and searched, and may have `said` (how the value is written), `node` (what shows it, made once
 * for a row) and `number`. `key` is what a row is known by.
 */
export function table(id, { caption, columns, key, none, sort }) {
  let rows = [];
  let order = sort;
  const shown = new Map();
  const body = element("tbody");
  const search = element("input", {
    "type": "search",
    "placeholder": `filter ${caption}`,
    "aria-label": `Filter ${caption}`,
    "spellcheck": "false",
  });
  const note = element("p", { class: "hint" });
  const empty = element("p", { class: "none" }, none);
  const heads = columns.map((column, at) => {
    const button = element("button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      const turned = order?.at === at;
      order = { at, descending: turned ? !order.descending : Boolean(column.number) };
      show();
    });
    return element(
      "th",
      { scope: "col", class: column.number ? "number" : null },
      sort ? button : column.name,
    );
  });
  const head = element("thead", {}, element("tr", {}, ...heads));
  const whole = element("table", { "class": "rows", "aria-label": caption }, head, body);
  const top = element("div", { class: "above" }, search, note);
  byId(id).replaceChildren(top, scrolled(caption, whole), empty);
  search.addEventListener("input", () => show());

  const make = (row) => {
    const cells = columns.map((column) =>
      element("td", { class: column.number ? "number" : null }, ...(column.node ? [column.node(row)] : [])),
    );
    return { node: element("tr", {}, ...cells), cells };
  };

  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const matching = rows.filter(
      (row) =>
        !wanted || columns.some((column) => `${column.value(row) ?? ""}`.toLowerCase().includes(wanted)),
    );
    if (order) matching.sort(by(columns[order.at].value, order.descending));
    heads.forEach((node, at) => {
      if (order?.at === at) node.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
      else node.removeAttribute("aria-sort");
    });
    const gone = new Set(shown.keys());
    matching.forEach((row, at) => {
      const name = key(row);
      gone.delete(name);
      if (!shown.has(name)) shown.set(name, make(row));
      const { node, cells } = shown.get(name);
      columns.forEach((column, at) => {
        const value = column.value(row);
        if (!column.node) say(cells[at], column.said ? column.said(value) : `${value ?? NONE}`);
      });
      if (body.children[at] !== node) body.insertBefore(node, body.children[at] ?? null);
    });
    for (const name of gone) {
      shown.get(name).node.remove();
      shown.delete(name);
    }
    whole.hidden = matching.length === 0;
    empty.hidden = matching.length > 0;
    say(empty, rows.length ? `None of the ${caption} matches the filter.` : none);
  };

  /** `total` is how many there are, where the bridge told of fewer. */
  return (now, total = now.length) => {
    rows = now;
    say(note, total > now.length ? `${now.length} of ${total} are shown` : "");
    show();
  };
}

function by(value, descending) {
  const sign = descending ? -1 : 1;
  return (a, b) => {
    const [left, right] = [value(a) ?? "", value(b) ?? ""];
    const less =
      typeof left === "number" && typeof right === "number"
        ? left - right
        : `${left}`.localeCompare(`${right}`, "en", { numeric: true });
    return sign * less;
  };
}
