// Search from disk. Browsers start no Worker from a file:// page, so the search's worker runs in a hidden frame of the same
// page instead. Material would fetch a script for this from a CDN; its name is what its offline plugin and its search look for.
"use strict";
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    #waiting = []; // what was said before the script was there

    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.post = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      const script = frame.contentDocument.createElement("script");
      script.src = new URL(address, location.href).href;
      script.addEventListener("load", () => {
        this.#waiting.forEach(this.post);
        this.#waiting = null;
      });
      frame.contentDocument.body.append(script);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.post(data);
    }
  };
}
