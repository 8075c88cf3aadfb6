/* Lets the search run in a site that is opened as files, where browsers start no workers: the script of the worker runs in
 * a hidden frame instead. It replaces a script that the theme would fetch from the network. */
(() => {
  if (location.protocol !== "file:") return

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      const load = each => new Promise((done, failed) => {
        const script = inside.document.createElement("script")
        script.src = each
        script.onload = done
        script.onerror = () => failed(new Error(`cannot load ${each}`))
        inside.document.body.appendChild(script)
      })
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => load(each)), Promise.resolve())
      this.ready = load(url)
      this.ready.catch(error => this.dispatchEvent(new ErrorEvent("error", { error, message: error.message })))
    }

    postMessage(data) {
      const inside = this.frame.contentWindow
      this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })), () => {})
    }

    terminate() {
      this.frame.remove()
    }
  }

  window.IFrameWorker = IFrameWorker
  window.Worker = IFrameWorker
})()
