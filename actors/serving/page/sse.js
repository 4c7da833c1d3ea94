// Server-sent events out of text that comes in arbitrary pieces. Pure: pieces in, the data of whole events out.

export class EventParser {
  #rest = "";
  #data = [];

  // The data of the events that this piece completes, in order.
  push(piece) {
    const found = [];
    const lines = (this.#rest + piece).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) found.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return found;
  }
}
