"""TFLite files: conversion, contents, versions, devices."""
