// The modules that ComfyUI's front end serves, for `npm run check` only.

declare module "*/scripts/app.js" {
  export const app: import("@comfyorg/comfyui-frontend-types").ComfyApp;
}

declare module "*/scripts/api.js" {
  export const api: import("@comfyorg/comfyui-frontend-types").ComfyApi;
}

declare const LiteGraph: { vueNodesMode: boolean };
